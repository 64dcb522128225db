"""How dense a block mask may be before attention over it is slower than dense attention, from measured rates."""

import torch

# On an H200 (bench/results/h200-2026-11-26.json) block-sparse attention ran at 231 to 398 TFLOP/s of the products it
# keeps, and the fastest dense attention at 464 (head dim 64) and 593 (head dim 128). In the least
# favourable row, 261 of 593, they take the same time at density 0.44.
# On a CPU it is faster than PyTorch's dense attention even at density 1 (docs/measured.md).
BREAK_EVEN = {"cuda": 0.44, "cpu": 1.0}


def break_even(device: torch.device) -> float:
    """The density up to which block-sparse attention is the faster one; on devices not measured, as on a GPU."""
    return BREAK_EVEN.get(device.type, BREAK_EVEN["cuda"])
