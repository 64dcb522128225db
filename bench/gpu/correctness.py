"""Small inputs through every kernel, against the definitions. A difference is an error."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.fused import EPS, GROUPS, TINY_ACTIVATION, cases, checked
from bench.gpu.inputs import TINY
from bench.gpu.results import Row
from k5kernels import BlockMask, TokenLayout, block_sparse_attention, nabla_attention, nabla_mask, sta_mask
from k5kernels.ops.fractal import fractal_flatten, fractal_unflatten
from k5kernels.ops.nabla_mask import nabla_mask_reference

LAYOUTS = {
    "full": TokenLayout(((2, 16, 24),)),
    "ragged": TokenLayout(((2, 9, 17), (1, 8, 20), (3, 5, 7))),
    "one block": TokenLayout(((1, 8, 8),)),
}
HEAD_DIMS = (64, 80, 128)
# Of the norm of the float64 result, by dtype: a rounding of the inputs to the products and of the result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WINDOW = (3, 3, 1)
# Means that are summed in another order may move one block over the threshold.
LARGEST_OTHER = 1


def check(device: torch.device, keep: Callable[[Row], None]) -> None:
    """Rows of the relative errors of attention; raises AssertionError at the first difference that is too large."""
    check_fused(device)
    for name, layout in LAYOUTS.items():
        check_masks(name, layout, device)
        check_nabla_attention(name, layout, device)
        for dim in HEAD_DIMS:
            for dtype in TOLERANCES:
                error = attention_error(layout, dim, dtype, device)
                assert error <= TOLERANCES[dtype], f"attention, {name}, D {dim}, {dtype}: error {error:.1e}"
                keep(Row("correct", f"{name}, D {dim}, {dtype}", "random", None, "k5", "relative error", error))


def check_small(device: torch.device) -> None:
    """Every kernel once, those of attention with and without whole blocks: for tools that slow them down."""
    check_fused(device)
    for name in ("full", "ragged"):
        layout = LAYOUTS[name]
        check_masks(name, layout, device)
        check_nabla_attention(name, layout, device, captured=False)
        for dim in (64, 128):
            error = attention_error(layout, dim, torch.bfloat16, device)
            assert error <= TOLERANCES[torch.bfloat16], f"attention, {name}, D {dim}: error {error:.1e}"


def attention_error(layout: TokenLayout, dim: int, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of the output and the three gradients; their bits must be the same twice."""
    q, k, v, grad = (x.to(dtype) for x in _normal(4, layout, dim, device))
    mask = random_mask(layout, device)
    ours, again = (_with_gradients(partial(block_sparse_attention, mask=mask), q, k, v, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), f"D {dim}, {dtype}: two runs differ"
    lists = (mask.offsets, mask.indices, layout.block_starts(device), layout.max_block_tokens, dim**-0.5)
    exact = _with_gradients(lambda *x: _differentiable_reference(*x, *lists), *(x.double() for x in (q, k, v, grad)))
    return max(((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in zip(ours, exact, strict=True))


def check_masks(name: str, layout: TokenLayout, device: torch.device) -> None:
    """NABLA's and Sliding-Tile Attention's lists are those of the references, the NaN included."""
    near = sta_mask(layout, WINDOW, device)
    on_cpu = sta_mask(layout, WINDOW, torch.device("cpu"))
    assert torch.equal(near.indices.cpu(), on_cpu.indices), f"sta_mask, {name}: not the CPU's"
    q, k = _normal(2, layout, 64, device)
    for value in (None, float("nan")):
        if value is not None:
            q[0, 0, 0, 0] = value
        for thr in (0.0, 0.5, 1.0):
            found = nabla_mask(q, k, layout, thr, WINDOW)
            sizes = (layout.max_block_tokens, layout.max_clip_blocks)
            starts = (layout.block_starts(device), layout.clip_block_starts(device))
            offsets, indices = nabla_mask_reference(q, k, *starts, *sizes, thr, near.offsets, near.indices)
            other = (found.to_dense() != BlockMask(offsets, indices, layout).to_dense()).sum().item()
            assert other <= LARGEST_OTHER, f"nabla_mask, {name}, thr {thr}: {other} blocks not as in the reference"


def check_nabla_attention(name: str, layout: TokenLayout, device: torch.device, captured: bool = True) -> None:
    """Attention over the bits of a mask is, to the bit, that over its lists, and so is its replay from a CUDA graph.

    Nothing that waits for the device can be captured. captured: whether to try it, which takes PyTorch's allocator.
    """
    q, k, v, grad = (x.bfloat16() for x in _normal(4, layout, 64, device))
    step = partial(_with_gradients, partial(nabla_attention, layout=layout, thr=0.6, sta=WINDOW), q, k, v, grad)
    mask = nabla_mask(q, k, layout, 0.6, WINDOW)
    expected = _with_gradients(partial(block_sparse_attention, mask=mask), q, k, v, grad)
    found = {"eager": step()}
    if device.type == "cuda" and captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        graph.replay()
        found["a CUDA graph"] = replayed
    for way, tensors in found.items():
        for one, other in zip(tensors, expected, strict=True):
            assert torch.equal(one, other), f"nabla_attention, {name}, {way}: not as over the lists of its mask"


def check_fused(device: torch.device) -> None:
    """The fused operators, with one clip and with several, and the order of the tokens."""
    for name, arguments in (*cases(TINY[0], TINY_ACTIVATION, device), *packed_cases(device), statistics_case(device)):
        checked(name, arguments)
    layout = LAYOUTS["full"]
    x = torch.randn(1, *layout.clips[0], 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    tokens = fractal_flatten(x.to(device), layout)
    assert torch.equal(tokens.cpu(), fractal_flatten(x, layout)), "fractal_flatten: not the CPU's"
    back = fractal_unflatten(tokens, layout)
    assert isinstance(back, Tensor)  # of one clip
    assert torch.equal(back.cpu(), x), "fractal_unflatten: not the inverse"


def packed_cases(device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """Names and arguments of the operators that take a row of modulation a clip, or a token."""
    random = torch.Generator(device).manual_seed(0)
    S, d = 200, 96
    x, y = (torch.randn(1, S, d, device=device, generator=random) for _ in range(2))
    found: list[tuple[str, tuple[Any, ...]]] = []
    for shape, starts in (((3, d), [0, 70, 71, S]), ((1, S, d), [0, S])):
        rows = torch.randn(shape, device=device, generator=random)
        found += [
            ("gated_residual", (x, y, rows, starts)),
            ("gated_residual_backward", (x, y, rows, starts)),
            ("layernorm_modulate", (x, rows, rows, EPS, starts)),
            ("layernorm_modulate_backward", (y, x, rows, EPS, list(shape), starts)),
        ]
    return found


def statistics_case(device: torch.device) -> tuple[str, tuple[Any, ...]]:
    """Gradients of a group's mean and variance, to an activation."""
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(TINY_ACTIVATION, device=device, generator=random)
    mean, grad_mean, grad_variance = (
        torch.randn(1, GROUPS, dtype=torch.float64, device=device, generator=random) for _ in range(3)
    )
    return "groupnorm_statistics_backward", (grad_mean, grad_variance, x, mean)


def random_mask(layout: TokenLayout, device: torch.device) -> BlockMask:
    """Half of the blocks of a clip for two heads; where there are several, row 1 reads nothing."""
    clip = layout.block_coordinates("cpu")[:, 0]
    random = torch.Generator().manual_seed(0)
    dense = (torch.rand(1, 2, layout.blocks, layout.blocks, generator=random) < 0.5) & (clip[:, None] == clip)
    dense |= torch.eye(layout.blocks, dtype=torch.bool)
    if layout.blocks > 1:
        dense[:, :, 1] = False
    return BlockMask.from_dense(dense.to(device), layout)


def _normal(number: int, layout: TokenLayout, dim: int, device: torch.device) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(1, 2, layout.tokens, dim, generator=random).to(device) for _ in range(number)]


def _with_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _differentiable_reference(q: Tensor, k: Tensor, v: Tensor, *lists: object) -> Tensor:
    """float64 is not taken by any kernel, so the operator runs on its reference."""
    return torch.ops.k5.block_sparse_attention(q, k, v, *lists)[0]
