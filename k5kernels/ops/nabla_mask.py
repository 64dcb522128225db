"""NABLA: which key blocks a query block reads, from the attention of pooled blocks (§5.4).

    probabilities = softmax(mean(q) mean(k)^T / sqrt(D))        means over the tokens of a block, keys of one clip
    kept: where the cumulative sum of the probabilities in ascending order is at least 1 - thr, and the largest

together with the blocks of a Sliding-Tile Attention mask where a window is given. The softmax and the sums are in
float32 whatever the dtype of q and k.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask, dense_to_bits, lists_to_dense, row_offsets
from k5kernels.ops.library import CPU_DTYPES, GPU_DTYPES, Accepts, register
from k5kernels.ops.sta_mask import check_window, sta_mask
from k5kernels.token_layout import TokenLayout, to_blocks

# Probabilities that the reference computes at a time: this bounds its memory beyond the result.
CHUNK = 1 << 24


def nabla_mask(
    q: Tensor, k: Tensor, layout: TokenLayout, thr: float, sta: tuple[int, int, int] | None = None
) -> BlockMask:
    """The mask of every batch and head (B_m = B, H_m = h); no gradient flows through it.

    q, k: [B, h, S, D] in fractal order, one floating dtype. thr: the probability mass kept, 0 to 1: 1 keeps every
    block of the clip, 0 one block. sta: a window (w_T, w_H, w_W) in blocks.

    Every query block keeps at least its most probable key block, whatever thr is and however the sum rounds. Of
    equally probable blocks as many are kept as the mass needs, those with the highest numbers first. Where the
    probabilities are NaN (NaN or infinite input), every block of the clip is kept, so that the NaN reaches the output
    as in dense attention.

    Raises ValueError where a shape, dtype or thr does not fit. Bit-reproducible. On a GPU the host waits for the length
    of the lists.
    """
    offsets, indices = torch.ops.k5.nabla_mask(*_arguments(q, k, layout, thr, sta))
    return BlockMask(offsets, indices, layout)


def nabla_bits(
    q: Tensor, k: Tensor, layout: TokenLayout, thr: float, sta: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The same mask as bits, without waiting for the device: (bits, offsets), as `bits_attention` takes them."""
    return torch.ops.k5.nabla_bits(*_arguments(q, k, layout, thr, sta))


def _arguments(
    q: Tensor, k: Tensor, layout: TokenLayout, thr: float, sta: tuple[int, int, int] | None
) -> tuple[Any, ...]:
    """Checked, and as the operators take them."""
    check_tokens("q", q, layout)
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"k: expected {q.dtype} {list(q.shape)} like q, got {k.dtype} {list(k.shape)}")
    check_thr(thr)
    near = None
    if sta is not None:
        check_window("sta", sta)
        near = sta_mask(layout, sta, q.device)
    return (
        q.detach(),
        k.detach(),
        layout.block_starts(q.device),
        layout.clip_block_starts(q.device),
        layout.max_block_tokens,
        layout.max_clip_blocks,
        thr,
        None if near is None else near.offsets,
        None if near is None else near.indices,
    )


def check_thr(thr: float) -> None:
    """Raise ValueError unless thr is a share of the probability mass."""
    if not 0 <= thr <= 1:
        raise ValueError(f"thr: expected the probability mass to keep, 0 to 1, got {thr}")


def check_tokens(name: str, x: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError unless x is a floating [B, h, S, D] of the layout's S tokens."""
    if x.ndim != 4 or x.shape[2] != layout.tokens or not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating [B, h, {layout.tokens}, D] for this layout, got {x.dtype} {list(x.shape)}"
        )


def nabla_mask_reference(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain PyTorch: (offsets, indices) of `BlockMask`.

    block_starts, clip_block_starts, max_block_tokens, max_clip_blocks: of the layout. sta_offsets, sta_indices: lists
    of a Sliding-Tile Attention mask to keep as well, or None.
    """
    B, h = q.shape[:2]
    blocks = block_starts.shape[0] - 1
    clip_starts = clip_block_starts.tolist()
    near = _near(sta_offsets, sta_indices, block_starts)
    counts, indices = [block_starts.new_empty(0, blocks)], [block_starts.new_empty(0, dtype=torch.int32)]
    heads = max(1, CHUNK // blocks**2)
    parts = ((sample, head) for sample in range(B) for head in range(0, h, heads))
    with torch.autocast(q.device.type, enabled=False):
        for sample, head in parts:
            q_pooled, k_pooled = (_pool(x[sample, head : head + heads], block_starts, max_block_tokens) for x in (q, k))
            kept = near.repeat(q_pooled.shape[0], 1, 1)
            for first, last in pairwise(clip_starts):
                kept[:, first:last, first:last] |= _select(q_pooled[:, first:last], k_pooled[:, first:last], thr)
            counts.append(kept.sum(-1))
            indices.append(kept.nonzero()[:, -1].to(torch.int32))
    return row_offsets(torch.cat(counts).view(B, h, blocks)), torch.cat(indices)


def nabla_bits_reference(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(bits, offsets): bit i of word w of a row is set where its list has key block 32·w + i.

    bits: int32 [B, h, N_b, ceil(N_b / 32)]. offsets: of the lists of `nabla_mask_reference`.
    """
    offsets, indices = nabla_mask_reference(
        q, k, block_starts, clip_block_starts, max_block_tokens, max_clip_blocks, thr, sta_offsets, sta_indices
    )
    return dense_to_bits(lists_to_dense(offsets, indices)), offsets


def _near(offsets: Tensor | None, indices: Tensor | None, block_starts: Tensor) -> Tensor:
    """The Sliding-Tile Attention mask as bool [1, N_b, N_b]; all False where there is none."""
    if offsets is None or indices is None:
        blocks = block_starts.shape[0] - 1
        return block_starts.new_zeros(1, blocks, blocks, dtype=torch.bool)
    return lists_to_dense(offsets, indices)[0]


def _pool(x: Tensor, block_starts: Tensor, max_block_tokens: int) -> Tensor:
    """Means over the tokens of each block: [heads, S, D] to float32 [heads, N_b, D]."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (to_blocks(x, block_starts, max_block_tokens).sum(-2) / block_starts.diff()[:, None]).float()


def _select(q: Tensor, k: Tensor, thr: float) -> Tensor:
    """Key blocks of one clip that each of its query blocks keeps: bool [heads, n, n] from pooled [heads, n, D]."""
    rows = max(1, CHUNK // (k.shape[0] * k.shape[1]))
    return torch.cat([_select_rows(part, k, thr) for part in q.split(rows, dim=1)], dim=1)


def _select_rows(q: Tensor, k: Tensor, thr: float) -> Tensor:
    probabilities = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    ascending, order = probabilities.sort(dim=-1)
    dropped = ascending.cumsum(-1) < 1 - thr  # False for NaN
    dropped[..., -1] = False
    return torch.empty_like(dropped).scatter_(-1, order, ~dropped)


def _fake(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    offsets = block_starts.new_empty(q.shape[0], q.shape[1], block_starts.shape[0])
    return offsets, block_starts.new_empty(kept, dtype=torch.int32)


def _bits_fake(
    q: Tensor,
    k: Tensor,
    block_starts: Tensor,
    clip_block_starts: Tensor,
    max_block_tokens: int,
    max_clip_blocks: int,
    thr: float,
    sta_offsets: Tensor | None,
    sta_indices: Tensor | None,
) -> tuple[Tensor, Tensor]:
    blocks = block_starts.shape[0] - 1
    bits = block_starts.new_empty(*q.shape[:2], blocks, (blocks + 31) // 32, dtype=torch.int32)
    return bits, block_starts.new_empty(*q.shape[:2], blocks + 1)


register(
    nabla_mask_reference,
    _fake,
    accepts={"cpu": Accepts(CPU_DTYPES), "cuda": Accepts(GPU_DTYPES)},
)
register(
    nabla_bits_reference,
    _bits_fake,
    accepts={"cuda": Accepts(GPU_DTYPES)},
)
