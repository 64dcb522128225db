"""What the report says of each kernel: its name in the table and the work of a launch at one of the report's sizes.

How a kernel is launched is not said here: `bench.gpu_report.launches` records it from the launchers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu_report.roofline import Size, Work
from k5kernels.triton import (
    attention_backward,
    attention_forward,
    attention_schedule,
    block_mask,
    fractal,
    gated_residual,
    groupnorm_silu_apply,
    groupnorm_silu_padded,
    groupnorm_statistics,
    hopper_pair,
    hopper_single,
    layernorm_modulate,
    nabla_mask,
    pair_lists,
    qk_norm_rope,
    sta_mask,
    token_runs,
)

Arguments = Mapping[str, Any]

BF16, FLOAT, INT, LONG = 2, 4, 4, 8  # bytes
BLOCK = 64  # tokens
COMPARISONS = nabla_mask.COARSE_STEPS.value
PARTS = nabla_mask.PARTS
STA_WINDOW = (11, 3, 3)
STA_BLOCKS = 11 * 3 * 3
ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Kernel:
    """title: from the arguments of a launch by name. work: from these and the size."""

    title: Callable[[Arguments], str]
    work: Callable[[Arguments, Size], Work]


def _tokens(size: Size) -> float:
    return float(size.heads) * size.tokens * size.head_dim


def _map_cells(size: Size) -> float:
    """Pairs of blocks, over all heads."""
    return float(size.heads) * size.blocks**2


def _kept(size: Size) -> float:
    return float(size.heads) * size.blocks * size.kept


def _pooled_bytes(size: Size) -> float:
    return float(size.heads) * size.blocks * size.head_dim * PARTS * BF16


def _pool(arguments: Arguments, size: Size) -> Work:
    return Work(_tokens(size), arguments["x"].element_size() * _tokens(size) + _pooled_bytes(size))


def _logits(arguments: Arguments, size: Size) -> Work:
    """Six products of bf16 parts come to one of float32: the selection follows the float32 map."""
    products = 6 * 2 * _map_cells(size) * size.head_dim
    return Work(products, 2 * _pooled_bytes(size) + FLOAT * _map_cells(size), tensor_core=True)


def _select(arguments: Arguments, size: Size) -> Work:
    """A comparison and an addition for each step of the bisection."""
    return Work(2 * COMPARISONS * _map_cells(size), FLOAT * _map_cells(size) + _map_cells(size) / 8)


def _bits_and_lists(arguments: Arguments, size: Size) -> Work:
    """A pass over the bits of the mask, with its lists read or written."""
    return Work(_map_cells(size), _map_cells(size) / 8 + INT * _kept(size))


def _bits(arguments: Arguments, size: Size) -> Work:
    return Work(_map_cells(size), _map_cells(size) / 8)


def _sta(arguments: Arguments, size: Size) -> Work:
    return Work(8.0 * size.blocks**2, INT * STA_BLOCKS * size.blocks + 4 * LONG * size.blocks)


def _gather(arguments: Arguments, size: Size) -> Work:
    return Work(0, size.tokens * (2 * BF16 * size.heads * size.head_dim + LONG))


def _attention(products: int, tensors: int, row_floats: int) -> Callable[[Arguments, Size], Work]:
    """products: matrix products of a kept block. tensors: those of all tokens that are read or written. row_floats:
    read or written for each token (lse, and the shift)."""

    def work(arguments: Arguments, size: Size) -> Work:
        element_size = _queries(arguments).element_size()
        rows = float(size.heads) * size.tokens
        lists = size.heads * size.blocks * (INT * size.kept + LONG)
        return Work(
            flops=2 * products * rows * size.kept * BLOCK * size.head_dim,
            bytes=rows * (tensors * element_size * size.head_dim + row_floats * FLOAT) + lists,
            tensor_core=element_size == BF16,
        )

    return work


def _row_shift(arguments: Arguments, size: Size) -> Work:
    rows = float(size.heads) * size.tokens
    return Work(2 * rows * size.head_dim, rows * (2 * arguments["out"].element_size() * size.head_dim + FLOAT))


def _split(arguments: Arguments, size: Size) -> Work:
    """A bisection for each end of a range, in each list."""
    ends = float(size.heads) * size.blocks * (arguments["RANGES"] + 1)
    steps = math.log2(size.kept)
    return Work(steps * ends, ends * (INT * steps + LONG))


def _combine(arguments: Arguments, size: Size) -> Work:
    out, parts = arguments["out"], arguments["partial_out"]
    values, partial = float(out.numel()), float(parts.numel())
    return Work(3 * partial, BF16 * values + FLOAT * partial * (1 + 1 / size.head_dim))


def _elementwise(operations: int) -> Callable[[Arguments, Size], Work]:
    """A kernel that reads or writes each of its tensors once. operations: for each value of the first of them."""

    def work(arguments: Arguments, size: Size) -> Work:
        tensors = {id(x): x for x in arguments.values() if isinstance(x, Tensor)}
        moved = sum(float(x.numel()) * x.element_size() for x in tensors.values())
        return Work(operations * float(next(iter(tensors.values())).numel()), moved)

    return work


def _modulated(title: str, tokens: str) -> Callable[[Arguments], str]:
    """tokens: the argument whose dtype the title names."""

    def of_launch(arguments: Arguments) -> str:
        per_token = any(arguments.get(name) for name in ("PER_TOKEN", "SHIFT_PER_TOKEN", "SCALE_PER_TOKEN"))
        per = ", per token" if per_token else ", per clip" if arguments["CLIPS"] > 1 else ""
        return f"{title} {_element(arguments[tokens])}{per}"

    return of_launch


def _activation(title: str) -> Callable[[Arguments], str]:
    def of_launch(arguments: Arguments) -> str:
        return f"{title} {_element(arguments['x'])}{', contiguous' if arguments['step_p'] == 1 else ''}"

    return of_launch


def _gradient_title(arguments: Arguments) -> str:
    if arguments["grad_x"] is None:
        part = "sums of channels"
    else:
        part = "gradient" if arguments["parts"] is None else "gradient by given statistics"
    return _activation(f"groupnorm_silu: {part}")(arguments)


def _element(tensor: Tensor) -> str:
    return ELEMENTS[tensor.dtype]


def _queries(arguments: Arguments) -> Tensor:
    """The dk, dv kernel loads q along its lists, perhaps through a tensor descriptor."""
    q = arguments["q"]
    return q.base if isinstance(q, TensorDescriptor | GluonDescriptor) else q


def _attention_title(kind: str) -> Callable[[Arguments], str]:
    def title(arguments: Arguments) -> str:
        shape = "" if arguments["FULL"] else ", ragged"
        ranges = f", {arguments['RANGES']} ranges, long lists first" if arguments.get("RANGES", 1) > 1 else ""
        tma = ", TMA" if arguments["TMA"] else ""
        return f"attention: {kind} {_element(_queries(arguments))}{shape}{tma}{ranges}"

    return title


def _always(title: str) -> Callable[[Arguments], str]:
    return lambda arguments: title


# In the order of the table.
KERNELS: dict[Any, Kernel] = {
    nabla_mask.pool_kernel: Kernel(lambda a: f"nabla_mask: pool {_element(a['x'])}", _pool),
    nabla_mask.logits_kernel: Kernel(_always("nabla_mask: logits bf16×6"), _logits),
    nabla_mask.select_kernel: Kernel(
        lambda a: "nabla_mask: select" if a["near"] is None else "nabla_mask: select with STA", _select
    ),
    block_mask.write_lists_kernel: Kernel(_always("block mask: lists of bits"), _bits_and_lists),
    block_mask.set_bits_kernel: Kernel(_always("block mask: bits of lists"), _bits_and_lists),
    sta_mask.count_near_kernel: Kernel(_always("sta_mask: count"), _sta),
    sta_mask.write_near_kernel: Kernel(_always("sta_mask: write"), _sta),
    fractal.gather_rows_kernel: Kernel(_always("fractal: gather bf16"), _gather),
    gated_residual.gated_residual_kernel: Kernel(_modulated("gated_residual: forward", "y"), _elementwise(2)),
    gated_residual.gated_residual_backward_kernel: Kernel(_modulated("gated_residual: backward", "y"), _elementwise(3)),
    layernorm_modulate.modulate_kernel: Kernel(_modulated("layernorm_modulate: forward", "x"), _elementwise(10)),
    layernorm_modulate.modulate_backward_kernel: Kernel(
        _modulated("layernorm_modulate: backward", "x"), _elementwise(20)
    ),
    qk_norm_rope.norm_rope_kernel: Kernel(lambda a: f"qk_norm_rope: forward {_element(a['q'])}", _elementwise(20)),
    qk_norm_rope.norm_rope_backward_kernel: Kernel(
        lambda a: f"qk_norm_rope: backward {_element(a['q'])}", _elementwise(40)
    ),
    groupnorm_statistics.moments_kernel: Kernel(_activation("groupnorm_statistics: moments"), _elementwise(3)),
    groupnorm_statistics.merge_moments_kernel: Kernel(
        lambda a: f"groupnorm_statistics: merge{', contiguous' if a['in_group'] == 1 else ''}", _elementwise(5)
    ),
    groupnorm_statistics.moments_backward_kernel: Kernel(
        _activation("groupnorm_statistics: backward"), _elementwise(3)
    ),
    groupnorm_silu_apply.apply_kernel: Kernel(_activation("groupnorm_silu: apply"), _elementwise(8)),
    groupnorm_silu_padded.apply_padded_kernel: Kernel(_activation("groupnorm_silu: apply and pad"), _elementwise(8)),
    groupnorm_silu_apply.gradient_kernel: Kernel(_gradient_title, _elementwise(20)),
    token_runs.sum_runs_kernel: Kernel(_always("token runs: sum"), _elementwise(1)),
    attention_forward.forward_kernel: Kernel(_attention_title("forward"), _attention(2, 4, 1)),
    attention_schedule.split_lists_kernel: Kernel(_always("attention: lists of ranges"), _split),
    attention_schedule.combine_kernel: Kernel(lambda a: f"attention: sum of {a['RANGES']} ranges", _combine),
    pair_lists.write_pairs_kernel: Kernel(_always("block mask: lists of pairs"), _bits_and_lists),
    hopper_single.hopper_single_kernel: Kernel(_always("attention on Hopper: forward bf16"), _attention(2, 4, 1)),
    hopper_pair.hopper_pair_kernel: Kernel(_always("attention on Hopper: forward bf16, pairs"), _attention(2, 4, 1)),
    attention_backward.backward_queries_kernel: Kernel(_attention_title("dq"), _attention(3, 5, 2)),
    attention_backward.backward_keys_kernel: Kernel(_attention_title("dk, dv"), _attention(4, 6, 2)),
    attention_backward.row_shift_kernel: Kernel(lambda a: f"attention: dout·out {_element(a['out'])}", _row_shift),
    block_mask.count_readers_kernel: Kernel(_always("block mask: count readers"), _bits),
    block_mask.write_readers_kernel: Kernel(_always("block mask: write readers"), _bits_and_lists),
}
