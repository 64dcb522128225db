"""One process on one GPU trains as a CPU does: bfloat16, NABLA, checkpointing and offload together."""

import pytest
import torch

from bench.gpu.block import NABLA
from bench.gpu.train import LARGEST_LOSS_DIFFERENCE, NANO, NANO_CLIP, STEPS
from bench.shaped_training import shaped_loop
from k5kernels.attention import AttentionConfig
from k5kernels.offload import ActivationOffload

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def furthest_loss(device: torch.device, steps: int, offload: ActivationOffload) -> float:
    """The largest relative difference of a step's loss from those of a CPU in float32."""
    attention = AttentionConfig("nabla", NABLA.thr)
    stated = shaped_loop(NANO, NANO_CLIP, CPU, attention)
    tried = shaped_loop(NANO, NANO_CLIP, device, attention, bf16=True, offload=offload)
    return max(abs(tried.step() / stated.step() - 1) for _ in range(steps))


@needs_cuda
def test_twenty_losses_on_a_gpu_are_those_of_a_cpu():
    assert furthest_loss(torch.device("cuda"), STEPS, ActivationOffload(min_bytes=0)) <= LARGEST_LOSS_DIFFERENCE


@pytest.mark.slow
def test_losses_in_bfloat16_with_offload_are_those_in_float32(tmp_path):
    """The same on a CPU, whose offload goes to a file."""
    assert 0 < furthest_loss(CPU, 3, ActivationOffload(tmp_path, min_bytes=0)) <= LARGEST_LOSS_DIFFERENCE
