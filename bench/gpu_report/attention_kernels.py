"""The variants of block-sparse attention's kernels, as launched at the report's sizes."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.gpu_report.compile import ARCHS, Size, Variant, Work
from bench.gpu_report.roofline import SIZES
from k5kernels.triton import attention_backward, attention_forward, block_mask
from k5kernels.triton import block_sparse_attention as attention

ELEMENT_SIZES = {"bf16": 2, "fp32": 4}
FLOAT, INT, LONG = 4, 4, 8  # bytes
BLOCK = 64
KERNELS = {
    "forward": attention_forward.forward_kernel,
    "forward_pairs": attention_forward.forward_pairs_kernel,
    "backward_queries": attention_backward.backward_queries_kernel,
    "backward_keys": attention_backward.backward_keys_kernel,
}
TITLES = {
    "forward": "attention: forward",
    "forward_pairs": "attention: forward, 128 rows",
    "backward_queries": "attention: dq",
    "backward_keys": "attention: dk, dv",
}
# Of each kernel: what it reads along its lists, matrix products of a kept block, tensors it reads and writes.
DESCRIBED = {
    "forward": ("k", "v"),
    "forward_pairs": ("k", "v"),
    "backward_queries": ("k", "v"),
    "backward_keys": ("q", "grad_out"),
}
PRODUCTS = {"forward": 2, "forward_pairs": 2, "backward_queries": 3, "backward_keys": 4}
TENSORS = {"forward": 4, "forward_pairs": 4, "backward_queries": 5, "backward_keys": 6}


def _attention_work(kernel: str, element_size: int, size: Size) -> Work:
    rows = float(size.heads) * size.tokens
    lists = size.heads * size.blocks * (INT * size.kept + LONG)
    of_rows = FLOAT * (1 if kernel.startswith("forward") else 2)  # lse, and the shift
    return Work(
        flops=2 * PRODUCTS[kernel] * rows * size.kept * BLOCK * size.head_dim,
        bytes=rows * (TENSORS[kernel] * element_size * size.head_dim + of_rows) + lists,
        tensor_core=element_size == 2,
    )


def _signature(kernel: Any, element: str, described: tuple[str, ...], tile: str) -> dict[str, str]:
    """Types by the names the kernels use."""
    types = dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"), f"*{element}")
    types |= dict.fromkeys(("lse", "shift", "grad_lse"), "*fp32") | dict.fromkeys(("offsets", "block_starts"), "*i64")
    types |= dict.fromkeys(("indices", "entries", "pairs", "readers", "bits"), "*i32")
    types |= dict.fromkeys(("scale", "exponent_scale"), "fp32") | dict.fromkeys(described, tile)
    return {name: types.get(name, "i32") for name in kernel.arg_names}


def _token_strides(kernel: Any) -> tuple[str, ...]:
    return tuple(name for name in kernel.arg_names if "_stride_" in name and not name.startswith("mask"))


def _attention(name: str, element: str, size: Size, generation: int, full: bool, described: bool) -> Variant:
    kernel, element_size, D = KERNELS[name], ELEMENT_SIZES[element], size.head_dim
    rows = attention.largest_tile(element_size, D)
    constexprs: dict[str, int | None] = {"D": D, "WIDTH": D, "TILE": rows, "FULL": full, "TMA": described}
    if name != "forward_pairs":
        constexprs["TILES"] = BLOCK // rows
    if name == "forward" and not attention.takes_pairs(element_size, D, generation):
        constexprs["pairs"] = None
    tile = f"tensordesc<{element}[1,1,{rows},{D}]>"
    return Variant(
        name=f"{TITLES[name]} {element}{'' if full else ', ragged'}{', TMA' if described else ''}",
        head_dim=D,
        kernel=kernel,
        signature=_signature(kernel, element, DESCRIBED[name] if described else (), tile),
        constexprs=constexprs,
        options=attention.options_of(name, element_size, D, generation),
        has_dot=element_size == 2,
        work=partial(_attention_work, name, element_size),
        multiples_of_16=_token_strides(kernel),
        capabilities=tuple(arch.capability for arch in ARCHS if arch.capability // 10 == generation),
    )


def _attention_variants(name: str, element: str, size: Size) -> Iterator[Variant]:
    """By pointers for full and for ragged blocks, and by tensor descriptors, on every GPU that launches them."""
    element_size = ELEMENT_SIZES[element]
    for generation in (arch.capability // 10 for arch in ARCHS):
        if name == "forward_pairs" and not attention.takes_pairs(element_size, size.head_dim, generation):
            continue
        yield _attention(name, element, size, generation, True, False)
        yield _attention(name, element, size, generation, False, False)
        if element_size == 2 and generation in attention.DESCRIPTOR_GENERATIONS[name, size.head_dim]:
            yield _attention(name, element, size, generation, True, True)


def _shift_work(size: Size) -> Work:
    rows = float(size.heads) * size.tokens
    return Work(2 * rows * size.head_dim, rows * (2 * 2 * size.head_dim + FLOAT), tensor_core=False)


def _row_shift(size: Size) -> Variant:
    kernel = attention_backward.row_shift_kernel
    signature = _signature(kernel, "bf16", (), "")
    return Variant(
        name="attention: dout·out bf16",
        head_dim=size.head_dim,
        kernel=kernel,
        signature=signature,
        constexprs={"D": size.head_dim, "WIDTH": size.head_dim, "TOKENS": attention.SHIFT_TOKENS, "grad_lse": None},
        options={"num_warps": 4},
        has_dot=False,
        work=_shift_work,
        multiples_of_16=_token_strides(kernel),
    )


def _list_work(lists: int, size: Size) -> Work:
    """A pass over the bits of the mask, and lists read or written."""
    cells = float(size.heads) * size.blocks**2
    kept = float(size.heads) * size.blocks * size.kept
    return Work(cells, cells / 8 + lists * INT * kept, tensor_core=False)


def _lists(title: str, kernel: Any, pointers: dict[str, str], constexprs: dict[str, Any], warps: int) -> Callable:
    """What makes the variant at a size of a kernel that goes through the bits of a mask."""
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    return lambda size: Variant(
        name=f"block mask: {title}",
        head_dim=size.head_dim,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        options={"num_warps": warps},
        has_dot=False,
        work=partial(_list_work, 0 if title == "count readers" else 1),
    )


_READERS = {"bits": "*i32", "counts": "*i64", "offsets": "*i64", "readers": "*i32"}
LISTS = [
    _lists(
        "bits of lists", block_mask.set_bits_kernel, {"offsets": "*i64", "indices": "*i32", "bits": "*i32"},
        {"first_keys": None, "KEYS": block_mask.LISTED_KEYS}, 1,
    ),
    _lists("count readers", block_mask.count_readers_kernel, _READERS, {"ROWS": block_mask.ROWS_AT_ONCE}, 4),
    _lists("write readers", block_mask.write_readers_kernel, _READERS, {"ROWS": block_mask.ROWS_AT_ONCE}, 4),
    _lists(
        "merge pairs", block_mask.merge_pairs_kernel,
        {"bits": "*i32", "offsets": "*i64", "entries": "*i32", "counts": "*i32"},
        {"KEYS": block_mask.PAIRED_KEYS}, 4,
    ),
]  # fmt: skip


def _variants(size: Size) -> Iterator[Variant]:
    for element in ELEMENT_SIZES:
        for name in KERNELS:
            yield from _attention_variants(name, element, size)
    yield _row_shift(size)
    for at in LISTS:
        yield at(size)


VARIANTS = [variant for size in SIZES.values() for variant in _variants(size)]
