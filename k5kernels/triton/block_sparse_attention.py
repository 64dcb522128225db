"""Block-sparse attention on the GPU: forward and dq over the lists of a mask, dk and dv over the transposed lists.

Forward takes two neighbouring query blocks as one tile of 128 rows where their lists overlap (`paired_lists`), so that
a key block is read once for both, and 64 rows elsewhere. Blocks of fewer tokens are masked; where all are full nothing
is, and key and value tiles may come through tensor descriptors (TMA, sm_90 and later).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from triton.tools.tensor_descriptor import TensorDescriptor

from k5kernels.ops.block_sparse_attention import (
    block_sparse_attention_backward_reference,
    block_sparse_attention_reference,
)
from k5kernels.triton.block_mask import FIRST_READS, KEY_BLOCK, SECOND_READS, paired_lists, transposed_lists

LARGEST_TILE = 64
LARGEST_HEAD_DIM = 128  # above, the reference serves
SHIFT_TOKENS = 16
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

# Compute capabilities (major) whose tensor cores work for four warps at a time: wgmma and tcgen05.
WARPGROUP_GENERATIONS = (9, 10)
# Those on which a kernel needs fewer registers when its tiles come through tensor descriptors (`make gpu-report`).
DESCRIPTOR_GENERATIONS = {
    "forward": (10, 12),
    "forward_pairs": (9, 10),
    "backward_queries": (9, 10),
    "backward_keys": (9, 10),
}

# How long the longest block of a layout is, by its block_starts: asked once, for the answer waits for the GPU.
_longest_blocks = WeakIdKeyDictionary()


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, indices: Tensor, block_starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) as in `k5kernels.ops.block_sparse_attention`. Bit-reproducible."""
    if q.shape[-1] > LARGEST_HEAD_DIM:
        return block_sparse_attention_reference(q, k, v, offsets, indices, block_starts, scale)
    B, h, S = q.shape[:3]
    blocks = block_starts.shape[0] - 1
    out, lse = q.new_empty(q.shape), q.new_empty(B, h, S, dtype=torch.float32)
    if q.numel() == 0:
        return out, lse
    q, k, v = (unit_stride(x) for x in (q, k, v))
    launch = Launch(q, block_starts)
    offsets = offsets.contiguous()
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (h, S, blocks, *mask_strides(offsets), scale * LOG2_E)
    pairs = None
    if launch.paired:
        entries, pairs = paired_lists(offsets, indices)
        (keys, values), options = launch.tiles("forward_pairs", k, v)
        forward_pairs_kernel[(blocks // 2, B * h)](
            q, keys, values, out, lse, offsets, entries, pairs, block_starts, *strides, *sizes, **options
        )
    (keys, values), options = launch.tiles("forward", k, v)
    forward_kernel[(blocks * launch.per_block, B * h)](
        q, keys, values, out, lse, offsets, indices, pairs, block_starts, *strides, *sizes,
        TILES=launch.per_block, **options,
    )  # fmt: skip
    return out, lse


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, as in `k5kernels.ops.block_sparse_attention`. Bit-reproducible."""
    if q.shape[-1] > LARGEST_HEAD_DIM:
        return block_sparse_attention_backward_reference(
            grad_out, grad_lse, q, k, v, out, lse, offsets, indices, block_starts, scale
        )
    B, h, S = q.shape[:3]
    blocks = block_starts.shape[0] - 1
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return grad_q, grad_k, grad_v
    grad_out, q, k, v, out = (unit_stride(x) for x in (grad_out, q, k, v, out))
    launch = Launch(q, block_starts)
    shift = row_shift(grad_out, out, grad_lse, launch.width)
    readers = transposed_lists(offsets, indices)
    offsets, lse = offsets.contiguous(), lse.contiguous()
    strides = tuple(stride for x in (q, k, v, grad_out) for stride in x.stride()[:3])
    sizes = (h, S, blocks, *mask_strides(offsets), scale, scale * LOG2_E)
    grid = (blocks * launch.per_block, B * h)
    (keys, values), options = launch.tiles("backward_queries", k, v)
    backward_queries_kernel[grid](
        q, keys, values, grad_out, lse, shift, grad_q, offsets, indices, block_starts, *strides, *sizes,
        TILES=launch.per_block, **options,
    )  # fmt: skip
    (queries, grads), options = launch.tiles("backward_keys", q, grad_out)
    backward_keys_kernel[grid](
        queries, k, v, grads, lse, shift, grad_k, grad_v, *readers, block_starts, *strides, *sizes,
        TILES=launch.per_block, **options,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


class Launch:
    """How blocks of tokens are cut into tiles, and what the kernels are compiled for.

    rows: of a tile; per_block: tiles of the longest block; full: whether every block fills its tiles; width: of a
    tile, the head dimension or the next power of two; paired: whether neighbouring blocks may share a tile.
    """

    def __init__(self, q: Tensor, block_starts: Tensor) -> None:
        longest = _longest_blocks.get(block_starts)
        if longest is None:
            longest = _longest_blocks[block_starts] = int(block_starts.diff().max())
        self.generation = generation_of(q.device)
        self.element_size, self.head_dim = q.element_size(), q.shape[3]
        self.width = max(16, triton.next_power_of_2(self.head_dim))
        self.rows = min(largest_tile(self.element_size, self.width), max(16, triton.next_power_of_2(longest)))
        self.per_block = triton.cdiv(longest, self.rows)
        self.full = q.shape[2] == (block_starts.shape[0] - 1) * self.rows * self.per_block
        whole = self.rows == LARGEST_TILE and self.per_block == 1
        self.paired = whole and takes_pairs(self.element_size, self.width, self.generation)

    def tiles(self, kernel: str, *tensors: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The tensors that a kernel reads along its lists, through descriptors where that serves, and its options."""
        described = self.generation in DESCRIPTOR_GENERATIONS[kernel] and self.full and self.element_size == 2
        described = described and self.head_dim == self.width and all(describable(x) for x in tensors)
        block = [1, 1, self.rows, self.width]
        read = [TensorDescriptor(x, [*x.shape], [*x.stride()], block) if described else x for x in tensors]
        constants = {"D": self.head_dim, "WIDTH": self.width, "TILE": self.rows, "FULL": self.full, "TMA": described}
        return read, constants | options_of(kernel, self.element_size, self.width, self.generation)


def generation_of(device: torch.device) -> int:
    """The major compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)[0]


def largest_tile(element_size: int, width: int) -> int:
    """Rows of a tile. float32 runs without tensor cores, whose larger tiles would not fit in registers."""
    if element_size == 2:
        return LARGEST_TILE
    return 32 if width <= 64 else 16


def takes_pairs(element_size: int, width: int, generation: int) -> bool:
    """Whether the accumulators of 128 rows fit in registers."""
    return element_size == 2 and (width <= 64 or generation in WARPGROUP_GENERATIONS)


def options_of(kernel: str, element_size: int, width: int, generation: int) -> dict[str, int]:
    """Warps and stages with which a kernel compiles without spills (`make gpu-report`)."""
    if element_size == 4:
        fewer = kernel == ("backward_keys" if width > 64 else "forward")
        return {"num_warps": 4 if fewer else 8, "num_stages": 1}
    more = kernel == "backward_keys" and generation not in WARPGROUP_GENERATIONS
    return {"num_warps": 8 if width > 64 or kernel == "forward_pairs" or more else 4, "num_stages": 2}


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can be made of x: 16-byte alignment of its start and of every step but the last."""
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy where its head dimension is not dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def mask_strides(offsets: Tensor) -> tuple[int, int]:
    """From a sample's, and a head's, offsets to the next; 0 where one list serves all."""
    batch, heads, rows = offsets.shape
    return (heads * rows if batch > 1 else 0), (rows if heads > 1 else 0)


def row_shift(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, width: int) -> Tensor:
    """dout·out - dlse of every token: float32 [B, h, S]."""
    B, h, S, D = out.shape
    shift = out.new_empty(B, h, S, dtype=torch.float32)
    row_shift_kernel[(triton.cdiv(S, SHIFT_TOKENS), B * h)](
        grad_out, out, None if grad_lse is None else grad_lse.contiguous(), shift,
        *grad_out.stride()[:3], *out.stride()[:3], h, S, D=D, WIDTH=width, TOKENS=SHIFT_TOKENS, num_warps=4,
    )  # fmt: skip
    return shift


@triton.jit
def load_rows(
    source, stride_s, first, end, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr
):
    """ROWS tokens of one head from `first` on, zeros from `end` on: [ROWS, WIDTH]."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    address = source + first.to(tl.int64) * stride_s + row[:, None] * stride_s + d[None, :]
    if FULL and D == WIDTH:
        rows = tl.load(address)
    else:
        rows = tl.load(address, mask=(first + row < end)[:, None] & (d < D)[None, :], other=0.0)
    return rows


@triton.jit
def store_rows(
    target, values, first, end, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr
):
    """What `load_rows` reads, to a dense [S, D]."""
    row = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    address = target + first.to(tl.int64) * D + row[:, None] * D + d[None, :]
    if FULL and D == WIDTH:
        tl.store(address, values)
    else:
        tl.store(address, values, mask=(first + row < end)[:, None] & (d < D)[None, :])


@triton.jit
def load_tile(
    source, stride_s, sample, head, first, end,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of the loop over a list: `source` is a tensor descriptor, or the address of the head's first token."""
    if TMA:
        tile = source.load([sample, head, first, 0]).reshape(TILE, WIDTH)
    else:
        tile = load_rows(source, stride_s, first, end, D, WIDTH, TILE, FULL)
    return tile


@triton.jit
def token_range(block_starts, block, tile, TILE: tl.constexpr, TILES: tl.constexpr, FULL: tl.constexpr):
    """(first token of a tile of a block, end of the block)."""
    if FULL:
        first = block * (TILE * TILES) + tile * TILE
        end = (block + 1) * (TILE * TILES)
    else:
        first = tl.load(block_starts + block).to(tl.int32) + tile * TILE
        end = tl.load(block_starts + block + 1).to(tl.int32)
    return first, end


@triton.jit
def softmax_step(scores, values, top, total, weighted):
    """Add a tile of values to a running softmax over rows; `top` may stay -inf as long as all scores are."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(top - shift)
    total = total * rescale + tl.sum(weights, axis=1)
    weighted = tl.dot(weights.to(values.dtype), values, weighted * rescale[:, None], input_precision="ieee")
    return new_top, total, weighted


@triton.jit
def store_attention(
    out, lse, top, total, weighted, reads, head_number, tokens, first, end,
    D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Divide by the sums; rows that read nothing get zeros and -inf."""
    mean = tl.where(reads[:, None], tl.div_rn(weighted, tl.broadcast_to(total[:, None], [ROWS, WIDTH])), 0.0)
    store_rows(out + head_number * tokens * D, mean.to(out.dtype.element_ty), first, end, D, WIDTH, ROWS, FULL)
    row = first + tl.arange(0, ROWS)
    logarithm = (top + tl.log2(total)) * LN_2
    tl.store(lse + head_number * tokens + row, tl.where(reads, logarithm, float("-inf")), mask=row < end)


@triton.jit
def forward_kernel(
    q, k, v, out, lse, offsets, indices, pairs, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    heads, tokens, blocks, mask_stride_b, mask_stride_h, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """A tile of one query block, unless its pair is attended by `forward_pairs_kernel`. scale: with log2(e)."""
    block = tl.program_id(0) // TILES
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    lists = sample.to(tl.int64) * mask_stride_b + head * mask_stride_h
    if pairs is not None:
        pair = pairs + lists // (blocks + 1) * (blocks // 2) + block // 2
        if tl.load(pair, mask=block // 2 < blocks // 2, other=0) > 0:
            return
    list_start = offsets + lists + block
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    queries = load_rows(
        q + sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h, q_stride_s, first, end,
        D, WIDTH, TILE, FULL,
    )  # fmt: skip
    if not TMA:
        k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        key_block = tl.load(indices + start + step // TILES)
        key, key_end = token_range(block_starts, key_block, step % TILES, TILE, TILES, FULL)
        keys = load_tile(k, k_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if not FULL:
            scores = tl.where((key + tl.arange(0, TILE) < key_end)[None, :], scores, float("-inf"))
        values = load_tile(v, v_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        top, total, weighted = softmax_step(scores, values, top, total, weighted)
    reads = tl.full([TILE], 1, tl.int32) * count > 0
    store_attention(out, lse, top, total, weighted, reads, head_number, tokens, first, end, D, WIDTH, TILE, FULL)


@triton.jit
def forward_pairs_kernel(
    q, k, v, out, lse, offsets, entries, pairs, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    heads, tokens, blocks, mask_stride_b, mask_stride_h, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Two neighbouring query blocks, where `paired_lists` merged their lists. scale: with log2(e)."""
    pair = tl.program_id(0)
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    lists = sample.to(tl.int64) * mask_stride_b + head * mask_stride_h
    count = tl.load(pairs + lists // (blocks + 1) * (blocks // 2) + pair)
    if count == 0:
        return
    offsets += lists + 2 * pair
    first, second = token_range(block_starts, 2 * pair, 0, TILE, 1, FULL)
    _, end = token_range(block_starts, 2 * pair + 1, 0, TILE, 1, FULL)
    ROWS: tl.constexpr = 2 * TILE
    queries = load_rows(
        q + sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h, q_stride_s, first, end,
        D, WIDTH, ROWS, FULL,
    )  # fmt: skip
    reader = tl.where(first + tl.arange(0, ROWS) < second, FIRST_READS, SECOND_READS)
    if not TMA:
        k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    start = tl.load(offsets)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, WIDTH], tl.float32)
    for step in tl.range(0, count):
        entry = tl.load(entries + start + step)
        key, key_end = token_range(block_starts, entry & KEY_BLOCK, 0, TILE, 1, FULL)
        keys = load_tile(k, k_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        reads = (reader & entry) != 0
        if not FULL:
            scores = tl.where((key + tl.arange(0, TILE) < key_end)[None, :], scores, float("-inf"))
        scores = tl.where(reads[:, None], scores, float("-inf"))
        values = load_tile(v, v_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        top, total, added = softmax_step(scores, values, top, total, weighted)
        # A weight of zero would still let through what is NaN or infinite in values that the row does not read.
        weighted = tl.where(reads[:, None], added, weighted)
    middle = tl.load(offsets + 1)
    listed = tl.where(reader == FIRST_READS, middle - start, tl.load(offsets + 2) - middle)
    store_attention(out, lse, top, total, weighted, listed > 0, head_number, tokens, first, end, D, WIDTH, ROWS, FULL)


@triton.jit
def row_shift_kernel(
    grad_out, out, grad_lse, shift,
    g_stride_b, g_stride_h, g_stride_s, o_stride_b, o_stride_h, o_stride_s, heads, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dout·out - dlse of some tokens of one head."""
    first = tl.program_id(0) * TOKENS
    head_number = tl.program_id(1).to(tl.int64)
    sample = head_number // heads
    head = head_number % heads
    grads = load_rows(
        grad_out + sample * g_stride_b + head * g_stride_h, g_stride_s, first, tokens, D, WIDTH, TOKENS, False
    )
    outs = load_rows(out + sample * o_stride_b + head * o_stride_h, o_stride_s, first, tokens, D, WIDTH, TOKENS, False)
    total = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), axis=1)
    token = first + tl.arange(0, TOKENS)
    there = token < tokens
    if grad_lse is not None:
        total -= tl.load(grad_lse + head_number * tokens + token, mask=there, other=0.0)
    tl.store(shift + head_number * tokens + token, total, mask=there)


@triton.jit
def backward_queries_kernel(
    q, k, v, grad_out, lse, shift, grad_q, offsets, indices, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_s, heads, tokens, blocks, mask_stride_b, mask_stride_h, scale, exponent_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dq of a tile of one query block, over the key blocks it reads. exponent_scale: scale with log2(e)."""
    block = tl.program_id(0) // TILES
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    q += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
    grad_out += sample.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    queries = load_rows(q, q_stride_s, first, end, D, WIDTH, TILE, FULL)
    grads = load_rows(grad_out, g_stride_s, first, end, D, WIDTH, TILE, FULL)
    row = first + tl.arange(0, TILE)
    exponent = tl.load(lse + head_number * tokens + row, mask=row < end, other=0.0) / LN_2
    shifts = tl.load(shift + head_number * tokens + row, mask=row < end, other=0.0)
    if not TMA:
        k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
        v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    list_start = offsets + sample.to(tl.int64) * mask_stride_b + head * mask_stride_h + block
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        key_block = tl.load(indices + start + step // TILES)
        key, key_end = token_range(block_starts, key_block, step % TILES, TILE, TILES, FULL)
        keys = load_tile(k, k_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        values = load_tile(v, v_stride_s, sample, head, key, key_end, D, WIDTH, TILE, FULL, TMA)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * exponent_scale
        p = tl.exp2(scores - exponent[:, None])
        if not FULL:
            p = tl.where((key + tl.arange(0, TILE) < key_end)[None, :], p, 0.0)
        grad_scores = p * (tl.dot(grads, tl.trans(values), input_precision="ieee") - shifts[:, None])
        total = tl.dot(grad_scores.to(keys.dtype), keys, total, input_precision="ieee")
    target = grad_q + head_number * tokens * D
    store_rows(target, (total * scale).to(grad_q.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)


@triton.jit
def backward_keys_kernel(
    q, k, v, grad_out, lse, shift, grad_k, grad_v, offsets, readers, block_starts,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    g_stride_b, g_stride_h, g_stride_s, heads, tokens, blocks, mask_stride_b, mask_stride_h, scale, exponent_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr, TMA: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of one key block, over the query blocks that read it; scores are [keys, queries]."""
    block = tl.program_id(0) // TILES
    head_number = tl.program_id(1).to(tl.int64)
    sample = (head_number // heads).to(tl.int32)
    head = (head_number % heads).to(tl.int32)
    first, end = token_range(block_starts, block, tl.program_id(0) % TILES, TILE, TILES, FULL)
    k += sample.to(tl.int64) * k_stride_b + head.to(tl.int64) * k_stride_h
    v += sample.to(tl.int64) * v_stride_b + head.to(tl.int64) * v_stride_h
    keys = load_rows(k, k_stride_s, first, end, D, WIDTH, TILE, FULL)
    values = load_rows(v, v_stride_s, first, end, D, WIDTH, TILE, FULL)
    if not TMA:
        q += sample.to(tl.int64) * q_stride_b + head.to(tl.int64) * q_stride_h
        grad_out += sample.to(tl.int64) * g_stride_b + head.to(tl.int64) * g_stride_h
    lse += head_number * tokens
    shift += head_number * tokens
    list_start = offsets + sample.to(tl.int64) * mask_stride_b + head * mask_stride_h + block
    start = tl.load(list_start)
    count = (tl.load(list_start + 1) - start).to(tl.int32)
    total_k = tl.zeros([TILE, WIDTH], tl.float32)
    total_v = tl.zeros([TILE, WIDTH], tl.float32)
    for step in tl.range(0, count * TILES):
        query_block = tl.load(readers + start + step // TILES)
        query, query_end = token_range(block_starts, query_block, step % TILES, TILE, TILES, FULL)
        # Zeros stand beyond the end of a block; what they add is zero.
        queries = load_tile(q, q_stride_s, sample, head, query, query_end, D, WIDTH, TILE, FULL, TMA)
        grads = load_tile(grad_out, g_stride_s, sample, head, query, query_end, D, WIDTH, TILE, FULL, TMA)
        row = query + tl.arange(0, TILE)
        exponent = tl.load(lse + row, mask=row < query_end, other=0.0) / LN_2
        shifts = tl.load(shift + row, mask=row < query_end, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * exponent_scale
        p = tl.exp2(scores - exponent[None, :])
        total_v = tl.dot(p.to(grads.dtype), grads, total_v, input_precision="ieee")
        grad_scores = p * (tl.dot(values, tl.trans(grads), input_precision="ieee") - shifts[None, :])
        total_k = tl.dot(grad_scores.to(queries.dtype), queries, total_k, input_precision="ieee")
    base = head_number * tokens * D
    store_rows(grad_k + base, (total_k * scale).to(grad_k.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)
    store_rows(grad_v + base, total_v.to(grad_v.dtype.element_ty), first, end, D, WIDTH, TILE, FULL)
