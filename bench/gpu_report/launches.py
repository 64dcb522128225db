"""What the launchers launch at the report's sizes on a GPU, recorded with tensors that have no memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.gpu_report.kernels import KERNELS, STA_WINDOW
from bench.gpu_report.roofline import Size, Work
from k5kernels import TokenLayout
from k5kernels.ops.sta_mask import kept_blocks
from k5kernels.triton import (
    block_mask,
    fractal,
    gated_residual,
    groupnorm_silu,
    groupnorm_silu_apply,
    groupnorm_silu_padded,
    groupnorm_statistics,
    hopper_attention,
    layernorm_modulate,
    nabla_mask,
    qk_norm_rope,
    sta_mask,
)
from k5kernels.triton import block_sparse_attention as attention
from k5kernels.triton.attention_schedule import Schedule
from k5kernels.triton.launch import Launch, record_launches

THR = 0.9
SCALE = 0.1
EPS = 1e-6
CAUSAL_PAD = (2, 1, 1)
HOPPER = 90


@dataclass(frozen=True)
class Variant:
    """A launch, the name of its row and its work. has_dot: whether its products must run on tensor cores."""

    name: str
    head_dim: int
    launch: Launch
    work: Work

    @property
    def has_dot(self) -> bool:
        return self.work.tensor_core


def variants(size: Size, capability: int) -> dict[str, Variant]:
    """The launches on a GPU of this compute capability by name; a name's first one stands for those that follow.

    Raises ValueError where two launches of one name differ in a constant: then the name does not tell them apart.
    """
    with record_launches(capability) as launches:
        _launch_all(size)
        if capability == HOPPER:
            _attend_on_hopper(size)
    found: dict[str, Variant] = {}
    for launch in launches:
        arguments = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
        kernel = KERNELS[launch.kernel]
        name = kernel.title(arguments)
        variant = Variant(name, size.head_dim, launch, kernel.work(arguments, size))
        if found.setdefault(name, variant).launch.constants != launch.constants:
            raise ValueError(f"{name}: launched with {found[name].launch.constants} and with {launch.constants}")
    return found


def _launch_all(size: Size) -> None:
    """Every launcher, with each kind of argument that makes it launch something else."""
    for dtype in (torch.bfloat16, torch.float32):
        # A batch that is expanded has a stride of zero, of which no tensor descriptor can be made.
        for layout, expanded in ((size.layout, True), (size.ragged, False), (size.layout, False)):
            _attend(size, layout, dtype, expanded)
        nabla_mask.pool(
            _tokens(size, size.layout, dtype), size.layout.block_starts("meta"), size.layout.max_block_tokens
        )
    _attend_in_ranges(size)
    _build_masks(size)
    _modulate(size)
    _normalize_heads(size)
    _normalize_groups(size)
    T, H, W = size.layout.clips[0]
    x = torch.empty(1, T, H, W, size.heads * size.head_dim, dtype=torch.bfloat16, device="meta")
    fractal.fractal_flatten(x, size.layout.block_side)


def _tokens(size: Size, layout: TokenLayout, dtype: torch.dtype, expanded: bool = False) -> Tensor:
    """[B, h, S, D] as projections leave it: a view of [B, S, h, D]."""
    x = torch.empty(layout.tokens, size.heads, size.head_dim, dtype=dtype, device="meta").transpose(0, 1)
    return x.expand(2, -1, -1, -1)[:1] if expanded else x.unsqueeze(0)


def _attend(size: Size, layout: TokenLayout, dtype: torch.dtype, expanded: bool) -> None:
    q, k, v, grad = (_tokens(size, layout, dtype, expanded) for _ in range(4))
    blocks = (layout.block_starts("meta"), layout.max_block_tokens)
    lists = (_offsets(size.heads, layout), torch.empty(_kept(size), dtype=torch.int32, device="meta"))
    out, lse = attention.block_sparse_attention(q, k, v, *lists, *blocks, SCALE)
    attention.block_sparse_attention_backward(grad, None, q, k, v, out, lse, *lists, *blocks, SCALE)


def _attend_in_ranges(size: Size) -> None:
    """The order that is asked for where the keys of a head do not fit the L2 cache."""
    q, k, v = (_tokens(size, size.layout, torch.bfloat16) for _ in range(3))
    blocks = (size.layout.block_starts("meta"), size.layout.max_block_tokens)
    lists = (_offsets(size.heads, size.layout), torch.empty(_kept(size), dtype=torch.int32, device="meta"))
    attention.block_sparse_attention(q, k, v, *lists, *blocks, SCALE, Schedule(longest_first=True, key_ranges=2))


def _attend_on_hopper(size: Size) -> None:
    layout = size.layout
    q, k, v = (_tokens(size, layout, torch.bfloat16) for _ in range(3))
    words = -(-layout.blocks // 32)
    bits = torch.empty(1, size.heads, layout.blocks, words, dtype=torch.int32, device="meta")
    blocks = (layout.block_starts("meta"), layout.max_block_tokens, layout.max_clip_blocks)
    for pairs in (False, True):
        hopper_attention.hopper_attention(q, k, v, bits, _offsets(size.heads, layout), *blocks, SCALE, pairs)


def _build_masks(size: Size) -> None:
    layout = size.layout
    window, coordinates = list(STA_WINDOW), layout.block_coordinates("meta")
    sta = sta_mask.sta_mask(coordinates, window, kept_blocks(layout, window))
    pooled = (nabla_mask.PARTS, size.heads, layout.blocks, size.head_dim)
    queries, keys = (torch.empty(pooled, dtype=torch.bfloat16, device="meta") for _ in range(2))
    rows = nabla_mask.keys_of_rows(layout.clip_block_starts("meta"), layout.blocks)
    for near in (None, block_mask.lists_to_bits(*sta)[0, 0]):
        bits, _ = nabla_mask.select(queries, keys, *rows, 1, layout.max_clip_blocks, THR, near)
    block_mask.bits_to_lists(bits[None], _offsets(size.heads, layout), _kept(size))


def _modulate(size: Size) -> None:
    """The operators that take a modulation: one row a sample, a clip or a token."""
    S, d = size.tokens, size.heads * size.head_dim
    for dtype, shape, starts in (
        (torch.bfloat16, (1, d), [0, S]),
        (torch.float32, (1, d), [0, S]),
        (torch.bfloat16, (4, d), [0, S // 4, S // 2, 3 * S // 4, S]),
        (torch.bfloat16, (1, S, d), [0, S]),
    ):
        x, y = (torch.empty(1, S, d, dtype=dtype, device="meta") for _ in range(2))
        rows = torch.empty(shape, dtype=dtype, device="meta")
        gated_residual.gated_residual(x, y, rows, starts)
        gated_residual.gated_residual_backward(x, y, rows, starts)
        layernorm_modulate.layernorm_modulate(x, rows, rows, EPS, starts)
        layernorm_modulate.layernorm_modulate_backward(x, y, rows, EPS, rows.shape, starts)


def _normalize_heads(size: Size) -> None:
    """q and k: views into a fused projection; their gradients: as attention gives them, heads before tokens."""
    for dtype in (torch.bfloat16, torch.float32):
        fused = torch.empty(1, size.tokens, 3, size.heads, size.head_dim, dtype=dtype, device="meta")
        grad = torch.empty(1, size.heads, size.tokens, size.head_dim, dtype=dtype, device="meta").transpose(1, 2)
        weight = torch.empty(size.head_dim, device="meta")
        angles = torch.empty(size.tokens, size.head_dim // 2, device="meta")
        q, k, _ = fused.unbind(2)
        qk_norm_rope.qk_norm_rope(q, k, weight, weight, angles, angles, EPS)
        qk_norm_rope.qk_norm_rope_backward(grad, grad, q, k, weight, weight, angles, angles, EPS)


def _normalize_groups(size: Size) -> None:
    """Activations of the VAE's widest resolution, of as many channels as a head of this size has; channels last but
    for one."""
    groups, channels = 32, size.head_dim
    weight, moments = (torch.empty(channels, device="meta"), torch.empty(1, groups, dtype=torch.float64, device="meta"))
    for dtype, memory_format in (
        (torch.bfloat16, torch.channels_last_3d),
        (torch.float32, torch.channels_last_3d),
        (torch.bfloat16, torch.contiguous_format),
    ):
        x = torch.empty(1, channels, 33, 512, 768, dtype=dtype, device="meta", memory_format=memory_format)
        groupnorm_silu.groupnorm_silu(x, weight, weight, groups, EPS)
        groupnorm_silu.groupnorm_silu_backward(x, x, weight, weight, groups, EPS)
        groupnorm_silu_padded.groupnorm_silu_padded(x, moments, moments, weight, weight, CAUSAL_PAD, EPS)
        groupnorm_silu_apply.groupnorm_silu_apply_backward(x, x, moments, moments, weight, weight, EPS)
        groupnorm_statistics.groupnorm_statistics_backward(moments, moments, x, moments)


def _offsets(heads: int, layout: TokenLayout) -> Tensor:
    return torch.empty(1, heads, layout.blocks + 1, dtype=torch.int64, device="meta")


def _kept(size: Size) -> int:
    return round(size.heads * size.blocks * size.kept)
