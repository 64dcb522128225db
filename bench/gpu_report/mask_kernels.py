"""The variants of the kernels that build block masks and reorder tokens, as launched at the report's sizes."""

from functools import partial

from bench.gpu_report.compile import Size, Variant, Work
from bench.gpu_report.roofline import SIZES
from k5kernels.triton import block_mask, fractal, nabla_mask, sta_mask

BF16, FLOAT, INT, LONG = 2, 4, 4, 8  # bytes
COMPARISONS = 31  # of a probability, in the bisection
STA_BLOCKS = 11 * 3 * 3


def _map_cells(size: Size) -> float:
    return float(size.heads) * size.blocks**2


def _tokens(size: Size) -> float:
    return float(size.heads) * size.tokens * size.head_dim


def _pooled_bytes(size: Size) -> float:
    return float(size.heads) * size.blocks * size.head_dim * FLOAT


def _pool_work(element_size: int, size: Size) -> Work:
    return Work(_tokens(size), element_size * _tokens(size) + _pooled_bytes(size), tensor_core=False)


def _logits_work(size: Size) -> Work:
    cells = _map_cells(size)
    return Work(2 * cells * size.head_dim, 2 * _pooled_bytes(size) + FLOAT * cells, tensor_core=False)


def _select_work(size: Size) -> Work:
    cells = _map_cells(size)
    return Work(2 * COMPARISONS * cells, FLOAT * cells + cells / 8, tensor_core=False)


def _write_work(size: Size) -> Work:
    kept = float(size.heads) * size.blocks * size.kept
    return Work(_map_cells(size), _map_cells(size) / 8 + INT * kept, tensor_core=False)


def _set_bits_work(size: Size) -> Work:
    return Work(STA_BLOCKS * size.blocks, INT * STA_BLOCKS * size.blocks + size.blocks**2 / 8, tensor_core=False)


def _sta_work(size: Size) -> Work:
    return Work(8.0 * size.blocks**2, INT * STA_BLOCKS * size.blocks + 4 * LONG * size.blocks, tensor_core=False)


def _gather_work(size: Size) -> Work:
    width = size.heads * size.head_dim
    return Work(0, size.tokens * (2 * BF16 * width + LONG), tensor_core=False)


def _pool(pointer: str, element_size: int, size: Size) -> Variant:
    integers = ["stride_b", "stride_h", "stride_s", "heads", "blocks"]
    return Variant(
        name=f"nabla_mask: pool {pointer.removeprefix('*')}",
        head_dim=size.head_dim,
        kernel=nabla_mask.pool_kernel,
        signature={"x": pointer, "block_starts": "*i64", "pooled": "*fp32", **dict.fromkeys(integers, "i32")},
        constexprs={"D": size.head_dim, "WIDTH": size.head_dim, "TOKENS": nabla_mask.POOLED_TOKENS},
        options={"num_warps": 2},
        has_dot=False,
        work=partial(_pool_work, element_size),
        multiples_of_16=("stride_b", "stride_h", "stride_s"),
    )


def _logits(size: Size) -> Variant:
    """Its tl.dot is in exact float32, which tensor cores do not have: the selection follows the float32 map."""
    integers = ["first_item", "tiles", "blocks", "step"]
    pointers = {"queries": "*fp32", "keys": "*fp32", "key_starts": "*i64", "key_counts": "*i64", "logits": "*fp32"}
    return Variant(
        name="nabla_mask: logits fp32",
        head_dim=size.head_dim,
        kernel=nabla_mask.logits_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32"), "scale": "fp32"},
        constexprs={
            "D": size.head_dim,
            "ROWS": nabla_mask.TILE_ROWS,
            "COLUMNS": nabla_mask.TILE_COLUMNS,
            "DEPTH": nabla_mask.TILE_DEPTH,
        },
        options={"num_warps": nabla_mask.LOGITS_WARPS},
        has_dot=False,
        work=_logits_work,
        multiples_of_16=("step",),
    )


def _select(sta: bool, size: Size) -> Variant:
    integers = ["first_item", "tiles", "blocks", "step", "words"]
    pointers = {"logits": "*fp32", "key_counts": "*i64", "kept": "*i32", "counts": "*i64"}
    columns, rows, warps = nabla_mask.whole_row_tile(size.blocks)
    near = {"near": "*i32"} if sta else {}
    return Variant(
        name=f"nabla_mask: select{' with STA' if sta else ''}",
        head_dim=size.head_dim,
        kernel=nabla_mask.select_kernel,
        signature={**pointers, **near, **dict.fromkeys(integers, "i32"), "dropped": "i64"},
        constexprs={**({} if sta else {"near": None}), "TILE": nabla_mask.TILE_ROWS, "ROWS": rows, "COLUMNS": columns},
        options={"num_warps": warps},
        has_dot=False,
        work=_select_work,
        multiples_of_16=("step",),
    )


def _write_lists(size: Size) -> Variant:
    integers = ["total_rows", "blocks", "words"]
    pointers = {"kept": "*i32", "key_starts": "*i64", "key_counts": "*i64", "offsets": "*i64", "indices": "*i32"}
    columns, rows, warps = nabla_mask.whole_row_tile(size.blocks)
    return Variant(
        name="nabla_mask: write lists",
        head_dim=size.head_dim,
        kernel=nabla_mask.write_lists_kernel,
        signature={**pointers, **dict.fromkeys(integers, "i32")},
        constexprs={"ROWS": rows, "COLUMNS": columns},
        options={"num_warps": warps},
        has_dot=False,
        work=_write_work,
    )


def _set_bits(size: Size) -> Variant:
    return Variant(
        name="nabla_mask: STA bits",
        head_dim=size.head_dim,
        kernel=block_mask.set_bits_kernel,
        signature={"offsets": "*i64", "indices": "*i32", "first_keys": "*i64", "bits": "*i32", "words": "i32"},
        constexprs={"KEYS": block_mask.LISTED_KEYS},
        options={"num_warps": 1},
        has_dot=False,
        work=_set_bits_work,
    )


def _sta(name: str, size: Size) -> Variant:
    written = {"count": {"counts": "*i64"}, "write": {"offsets": "*i64", "indices": "*i32"}}[name]
    integers = ["blocks", "reach_t", "reach_y", "reach_x"]
    return Variant(
        name=f"sta_mask: {name}",
        head_dim=size.head_dim,
        kernel=getattr(sta_mask, f"{name}_near_kernel"),
        signature={"coordinates": "*i64", **written, **dict.fromkeys(integers, "i32")},
        constexprs={"COLUMNS": sta_mask.COMPARED_BLOCKS},
        options={"num_warps": 4},
        has_dot=False,
        work=_sta_work,
    )


def _fractal(size: Size) -> Variant:
    rows, columns = fractal.copied_tile(size.heads * size.head_dim, BF16)
    integers = ["stride_b", "stride_s", "tokens", "length"]
    return Variant(
        name="fractal: gather bf16",
        head_dim=size.head_dim,
        kernel=fractal.gather_rows_kernel,
        signature={"source": "*i16", "order": "*i64", "target": "*i16", **dict.fromkeys(integers, "i32")},
        constexprs={"ROWS": rows, "COLUMNS": columns},
        options={"num_warps": fractal.WARPS},
        has_dot=False,
        work=_gather_work,
        multiples_of_16=("stride_b", "stride_s", "length"),
    )


VARIANTS = [
    variant
    for size in SIZES.values()
    for variant in (
        _pool("*bf16", BF16, size),
        _pool("*fp32", FLOAT, size),
        _logits(size),
        _select(False, size),
        _select(True, size),
        _write_lists(size),
        _set_bits(size),
        _sta("count", size),
        _sta("write", size),
        _fractal(size),
    )
]
