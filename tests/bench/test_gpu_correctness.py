"""What `bench.gpu` checks at small sizes, and so what the sanitizer sees, is every operator."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import correctness
from bench.gpu.fused import checked
from k5kernels.ops.library import OPERATORS

# `nabla_attention` takes these on a GPU, where `check_nabla_attention` holds them to the lists.
OF_BITS = {"nabla_bits", "bits_attention", "bits_attention_backward"}
# Of its own section, for its kernels can hang.
OF_HOPPER = {"hopper_attention"}
# Has no kernel for a GPU.
OF_THE_CPU = {"winograd_conv3d"}


class Called(TorchDispatchMode):
    """The names of the operators of this library that are called inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace == "k5":
            self.names.add(name)
        return function(*args, **(kwargs or {}))


def test_small_sizes_call_every_operator():
    with Called() as called:
        correctness.check_small(torch.device("cpu"))
    assert set(OPERATORS) - called.names == OF_BITS | OF_HOPPER | OF_THE_CPU


def test_operators_of_several_clips_and_of_rows_a_token_are_checked_too():
    cases = correctness.packed_cases(torch.device("cpu"))
    assert {len(arguments[-1]) for _, arguments in cases} == {2, 4}
    for name, arguments in cases:
        assert checked(name, arguments)
