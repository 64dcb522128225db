"""The fused operators, forward and backward: checked against their references, then timed against torch.compile of
these and against a copy of the bytes that must move."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.inputs import Size
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.gpu.timing import interleaved, quartiles
from k5kernels.ops.library import OPERATORS

# Of the norm of the reference's result in float32, for bfloat16 results.
LARGEST_DIFFERENCE = 1e-2
EPS = 1e-6
GROUPS = 32
CAUSAL_PAD = [2, 1, 1]  # of a 3 x 3 x 3 convolution
ACTIVATION, TINY_ACTIVATION = (1, 128, 33, 512, 768), (1, 64, 2, 8, 8)


def fused(run: Run) -> None:
    """Rows in ms, and of the share of the bandwidth of a copy of the same bytes."""
    on_gpu = run.device.type == "cuda"
    for size in run.sizes:
        for name, arguments in cases(size, ACTIVATION if on_gpu else TINY_ACTIVATION, run.device):
            kernel, reference = getattr(torch.ops.k5, name), OPERATORS[name].reference
            outputs = checked(name, arguments)
            # A tensor that stands twice among the arguments moves twice: the kernels do not know.
            moved = sum(x.numel() * x.element_size() for x in (*arguments, *outputs) if isinstance(x, Tensor))
            source, target = (torch.empty(moved // 2, dtype=torch.uint8, device=run.device) for _ in range(2))
            del outputs
            variants = {"k5": partial(kernel, *arguments), "copy": partial(target.copy_, source)}
            if on_gpu:
                variants["torch.compile"] = partial(torch.compile(reference, fullgraph=True), *arguments)
            times = interleaved(variants)
            copy = quartiles(times["copy"])[1]
            for variant, of_variant in times.items():
                lower, median, upper = quartiles(of_variant)
                about = ("fused", f"{size}: {name}", None, None, variant)
                run.keep(Row(*about, "ms", median, lower, upper, len(of_variant)))
                run.keep(Row(*about, "share of copy", copy / median, copy / upper, copy / lower, len(of_variant)))


def cases(size: Size, activation: Sequence[int], device: torch.device) -> list[tuple[str, tuple[Any, ...]]]:
    """Names and arguments of the operators at the tokens of a size, and at an activation of the VAE."""
    T, H, W = size.clip
    S, d = T * H * W, size.heads * size.head_dim
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=random)

    x, y, rows = normal(1, S, d), normal(1, S, d), normal(1, d)
    q, k, _ = normal(1, S, 3, size.heads, size.head_dim).unbind(2)
    weight, angle = normal(size.head_dim, dtype=torch.float32), normal(S, size.head_dim // 2, dtype=torch.float32)
    rope = (q, k, weight, weight, angle.cos(), angle.sin(), EPS)
    z, of_z = (normal(*activation).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    affine = (normal(activation[1], dtype=torch.float32),) * 2
    moments = tuple(normal(1, GROUPS, dtype=torch.float64).square() for _ in range(2))
    starts = [0, S]
    return [
        ("gated_residual", (x, y, rows, starts)),
        ("gated_residual_backward", (x, y, rows, starts)),
        ("layernorm_modulate", (x, rows, rows, EPS, starts)),
        ("layernorm_modulate_backward", (y, x, rows, EPS, list(rows.shape), starts)),
        ("qk_norm_rope", rope),
        ("qk_norm_rope_backward", (x.view(q.shape), y.view(q.shape), *rope)),
        ("groupnorm_statistics", (z, GROUPS)),
        ("groupnorm_silu_apply", (z, *moments, *affine, EPS)),
        ("groupnorm_silu_padded", (z, *moments, *affine, CAUSAL_PAD, EPS)),
        ("groupnorm_silu_apply_backward", (of_z, z, *moments, *affine, EPS)),
        ("groupnorm_silu", (z, *affine, GROUPS, EPS)),
        ("groupnorm_silu_backward", (of_z, z, *affine, GROUPS, EPS)),
    ]


def checked(name: str, arguments: Sequence[Any]) -> list[Tensor]:
    """The operator's results; AssertionError where they differ from its reference's, or from one run to the next."""
    kernel = getattr(torch.ops.k5, name)
    outputs = _results(kernel(*arguments))
    _check(name, outputs, _results(kernel(*arguments)), _results(OPERATORS[name].reference(*_widened(arguments))))
    return outputs


def _widened(arguments: Sequence[Any]) -> list[Any]:
    return [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in arguments]


def _results(returned: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [returned] if isinstance(returned, Tensor) else list(returned)


def _check(name: str, ours: list[Tensor], again: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other, expected in zip(ours, again, theirs, strict=True):
        assert torch.equal(one, other), f"{name}: two runs differ"
        difference = ((one.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()
        assert difference <= LARGEST_DIFFERENCE, f"{name}: differs from its reference by {difference:.1e} of its norm"
