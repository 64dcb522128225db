"""What offload of block inputs costs a training step, and what memory it saves; the gradients are compared first.

NABLA against dense attention in a training step of the same code is in `bench_block`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.harness import compare
from bench.memory_trace import Trace, figures, small_model, step_of, trace
from k5kernels.offload import ActivationOffload
from model.crossdit import CrossDiT

ROUNDS = 5
SLOWEST = 1 / 1.10  # of a step with offload, against one without


def test_offload(benchmark, tmp_path):
    """Step time with block inputs in a file, against kept ones; and the memory both hold."""
    model = small_model()
    step = step_of(model)
    offload = ActivationOffload(tmp_path, min_bytes=1)

    def run(away: ActivationOffload | None) -> list[Tensor]:
        model.offload = away
        step()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = [gradient.clone() for gradient in run(None)]

    def check(gradients: list[Tensor]) -> None:
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))

    kept, offloaded = traces(model, step, offload)
    found = figures(kept, offloaded, model)
    benchmark.extra_info.update(found)
    words = (
        f"{found['blocks']} blocks, {found['tokens']} tokens, width {found['model_dim']}: "
        f"{found['saved_block_inputs']} block inputs saved, peak {found['peak_share']:.0%}"
    )
    variants = {"offload": partial(run, offload), "kept": partial(run, None)}
    compare(benchmark, words, variants, check, floors={"kept": SLOWEST}, rounds=ROUNDS)
    # At most three of the sixteen stay.
    assert found["saved_block_inputs"] >= model.config.visual_blocks - 3


def traces(model: CrossDiT, step: Callable[[], Tensor], offload: ActivationOffload) -> tuple[Trace, Trace]:
    """The memory of a step with block inputs kept, and with offload."""
    model.offload = None
    kept = trace("checkpointing", step)
    model.offload = offload
    return kept, trace("checkpointing with offload", step)
