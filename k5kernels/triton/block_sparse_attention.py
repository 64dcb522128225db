"""Block-sparse attention on the GPU: forward and dq over the lists of a mask, dk and dv over the transposed lists.

A tile has the tokens of one block, up to 64. Rows beyond the end of a smaller block are masked; a layout of full blocks
needs no masks, and its tiles may be loaded through tensor descriptors (TMA).
"""

import itertools
import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from k5kernels.triton.attention_backward import backward_keys_kernel, backward_queries_kernel, row_shift_kernel
from k5kernels.triton.attention_configurations import configuration
from k5kernels.triton.attention_forward import forward_kernel
from k5kernels.triton.attention_schedule import IN_ORDER, Schedule, combine, order_of_blocks, split_lists
from k5kernels.triton.block_mask import transposed_lists
from k5kernels.triton.launch import generation_of, launch

LARGEST_TILE = 64
SHIFT_TOKENS = 16
# Of the partial results of ranges of keys, in memory at a time: those of one or two heads of the longest clips.
PARTIAL_BYTES = 1 << 28
LOG2_E = math.log2(math.e)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
    schedule: Schedule = IN_ORDER,
) -> tuple[Tensor, Tensor]:
    """(out, lse) as in `k5kernels.ops.block_sparse_attention`. Bit-reproducible.

    schedule: another order in which to go through the blocks of a head; the operator has none.
    """
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel():
        attend(out, lse, q, k, v, offsets, indices, block_starts, max_block_tokens, scale, schedule)
    return out, lse


def attend(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
    schedule: Schedule = IN_ORDER,
) -> None:
    """Write out [B, h, S, D] and lse [B, h, S], both contiguous."""
    B, h, S, D = q.shape
    blocks = (block_starts, max_block_tokens, scale)
    if schedule.key_ranges == 1:
        order = order_of_blocks(offsets, B, h) if schedule.longest_first else None
        forward(out, lse, q, k, v, offsets.contiguous(), indices, *blocks, order, 1)
        return
    ranges = schedule.key_ranges
    heads_at_once = max(1, PARTIAL_BYTES // (4 * ranges * S * (D + 1)))
    for sample, first in itertools.product(range(B), range(0, h, heads_at_once)):
        part = (slice(sample, sample + 1), slice(first, first + heads_at_once))
        own = offsets[tuple(x if n > 1 else slice(None) for x, n in zip(part, offsets.shape[:2], strict=False))]
        heads = out[part].shape[1]
        order = order_of_blocks(own, 1, heads) if schedule.longest_first else None
        partial_out = out.new_empty(heads, ranges, S, D, dtype=torch.float32)
        partial_lse = lse.new_empty(heads, ranges, S)
        lists = split_lists(own, indices, ranges).flatten(2)
        forward(partial_out, partial_lse, q[part], k[part], v[part], lists, indices, *blocks, order, ranges)
        combine(out[part], lse[part], partial_out, partial_lse)


def forward(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Tensor,
    indices: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
    order: Tensor | None,
    ranges: int,
) -> None:
    """Write out and lse, of each range of keys where there are several. lists: offsets, or those of `split_lists`."""
    B, h, S = q.shape[:3]
    blocks = block_starts.shape[0] - 1
    q, k, v = (addressable(x) for x in (q, k, v))
    tiling = Tiling(q, blocks, max_block_tokens)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    sizes = (h, S, blocks, *mask_strides(lists), scale * LOG2_E)
    (keys, values), constants = tiling.tiles("forward", k, v)
    launch(
        forward_kernel, (blocks * tiling.per_block, B * h * ranges),
        q, keys, values, out, lse, lists, indices, block_starts, *strides, *sizes, order,
        TILES=tiling.per_block, RANGES=ranges, **constants,
    )  # fmt: skip


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
    max_block_tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, as in `k5kernels.ops.block_sparse_attention`. Bit-reproducible."""
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    if q.numel():
        readers = transposed_lists(offsets, indices)
        lists = (offsets, indices, *readers)
        differentiate(grads, grad_out, grad_lse, q, k, v, out, lse, *lists, block_starts, max_block_tokens, scale)
    return grads


def differentiate(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    indices: Tensor,
    reader_offsets: Tensor,
    readers: Tensor,
    block_starts: Tensor,
    max_block_tokens: int,
    scale: float,
) -> None:
    """Write the gradients of q, k and v, contiguous. reader_offsets, readers: the transposed lists."""
    B, h, S = q.shape[:3]
    blocks = block_starts.shape[0] - 1
    grad_q, grad_k, grad_v = grads
    grad_out, q, k, v, out = (addressable(x) for x in (grad_out, q, k, v, out))
    tiling = Tiling(q, blocks, max_block_tokens)
    shift = row_shift(grad_out, out, grad_lse, tiling.width)
    offsets, lse = offsets.contiguous(), lse.contiguous()
    strides = tuple(stride for x in (q, k, v, grad_out) for stride in x.stride()[:3])
    sizes = (h, S, blocks, *mask_strides(offsets), scale, scale * LOG2_E)
    grid = (blocks * tiling.per_block, B * h)
    (keys, values), constants = tiling.tiles("backward_queries", k, v)
    launch(
        backward_queries_kernel, grid,
        q, keys, values, grad_out, lse, shift, grad_q, offsets, indices, block_starts, *strides, *sizes,
        TILES=tiling.per_block, **constants,
    )  # fmt: skip
    (queries, grad_tiles), constants = tiling.tiles("backward_keys", q, grad_out)
    launch(
        backward_keys_kernel, grid,
        queries, k, v, grad_tiles, lse, shift, grad_k, grad_v, reader_offsets, readers, block_starts, *strides, *sizes,
        TILES=tiling.per_block, **constants,
    )  # fmt: skip


class Tiling:
    """How the blocks of tokens are divided into tiles, and the constants of the kernels that follow from it.

    rows: of a tile. per_block: tiles of the largest block. full: whether every block fills all its tiles. width:
    columns of a tile, the next power of two from the head dimension on, at least 16.
    """

    def __init__(self, q: Tensor, blocks: int, max_block_tokens: int) -> None:
        self.generation = generation_of(q.device)
        self.element_size, self.head_dim = q.element_size(), q.shape[3]
        self.width = max(16, triton.next_power_of_2(self.head_dim))
        self.rows = min(largest_tile(self.element_size, self.width), max(16, triton.next_power_of_2(max_block_tokens)))
        self.per_block = triton.cdiv(max_block_tokens, self.rows)
        self.full = q.shape[2] == blocks * self.rows * self.per_block

    def tiles(self, kernel: str, *tensors: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The tensors that a kernel loads along its lists, as tensor descriptors where it uses those; its constants.

        The constants are the constexpr arguments, num_warps and num_stages.
        """
        possible = self.full and all(describable(x) for x in tensors)
        chosen = configuration(kernel, self.element_size, self.head_dim, self.generation, possible)
        described = chosen.descriptors
        block = [1, 1, self.rows, self.width]
        read = [TensorDescriptor(x, [*x.shape], [*x.stride()], block) if described else x for x in tensors]
        constants = {"D": self.head_dim, "WIDTH": self.width, "TILE": self.rows, "FULL": self.full, "TMA": described}
        return read, constants | {"num_warps": chosen.warps, "num_stages": chosen.stages}


def largest_tile(element_size: int, width: int) -> int:
    """Rows of a tile. In float32, which does not use tensor cores, a larger tile would not fit in registers."""
    if element_size == 2:
        return LARGEST_TILE
    return 32 if width <= 64 else 16


def describable(x: Tensor) -> bool:
    """Whether x can have a tensor descriptor: its start and all strides but the last are multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])


def addressable(x: Tensor) -> Tensor:
    """x, or a copy where D is not contiguous or where offsets inside a tile would not fit in the kernels' int32."""
    return x if x.stride(-1) == 1 and x.stride(2) * LARGEST_TILE < 2**31 else x.contiguous()


def mask_strides(offsets: Tensor) -> tuple[int, int]:
    """Distances between the offsets of two samples and of two heads; 0 where all share one mask."""
    batch, heads, rows = offsets.shape
    return (heads * rows if batch > 1 else 0), (rows if heads > 1 else 0)


def row_shift(grad_out: Tensor, out: Tensor, grad_lse: Tensor | None, width: int) -> Tensor:
    """dout·out - dlse of every token: float32 [B, h, S]."""
    B, h, S, D = out.shape
    shift = out.new_empty(B, h, S, dtype=torch.float32)
    launch(
        row_shift_kernel, (triton.cdiv(S, SHIFT_TOKENS), B * h),
        grad_out, out, None if grad_lse is None else grad_lse.contiguous(), shift,
        *grad_out.stride()[:3], *out.stride()[:3], h, S, D=D, WIDTH=width, TOKENS=SHIFT_TOKENS, num_warps=4,
    )  # fmt: skip
    return shift
