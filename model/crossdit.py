"""CrossDiT: the diffusion transformer of Kandinsky 5.0 (§5.2–5.3), on k5kernels' operators.

    text tokens  → Linear, LayerNorm → LTF blocks (self-attention, MLP)          ┐ keys and values
    pooled text  → Linear, LayerNorm ─┐                                          │
    time         → sinusoids, MLP ────┴→ time embedding → modulation of a block ─┤
    latent patch → Linear → visual blocks (self-attention, cross-attention, MLP) ┴→ adaLN → Linear → velocity

Parameter names and shapes are those of the released weights in diffusers' layout.

Shapes: B batch, S visual tokens, L text tokens, d model width, h heads, D head dim.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.attention import attention as run_attention
from k5kernels.offload import offload_saved_tensors
from k5kernels.ops.fractal import fractal_flatten, fractal_unflatten
from k5kernels.ops.gated_residual import gated_residual
from k5kernels.ops.layernorm_modulate import layernorm_modulate
from k5kernels.ops.qk_norm_rope import qk_norm_rope
from k5kernels.presets import CrossDiTConfig
from k5kernels.token_layout import TokenLayout
from model.conditioning import TextCondition
from model.rope import frequencies, text_rope, visual_rope

LAYERNORM_EPS = 1e-5
RMSNORM_EPS = torch.finfo(torch.float32).eps

Blocks = Callable[[Tensor], Tensor]
Cache = Callable[[Blocks, Tensor], Tensor]
SelfAttend = Callable[[Tensor, Tensor, Tensor], Tensor]


class CrossDiT(nn.Module):
    """The velocity of a noisy latent, given time and text.

    gradient_checkpointing: recompute each visual block in the backward instead of keeping its activations.
    offload: keep the checkpointed blocks' inputs in host memory until the backward asks for them (§6.1).
    """

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.offload = False
        self.time_embeddings = TimeEmbedding(config.model_dim, config.time_dim)
        self.text_embeddings = TextEmbedding(config.in_text_dim, config.model_dim)
        self.pooled_text_embeddings = TextEmbedding(config.in_text_dim2, config.time_dim)
        self.visual_embeddings = VisualEmbedding(config)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(config) for _ in range(config.text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(VisualBlock(config) for _ in range(config.visual_blocks))
        self.out_layer = OutLayer(config)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        text: TextCondition,
        *,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        attention: AttentionConfig = DENSE,
        cache: Cache | None = None,
    ) -> Tensor:
        """velocity [B, T, H, W, out_visual_dim], in the dtype the model computes in.

        x: [B, T, H, W, C] latent, channels last, C = config.input_channels; sides are multiples of the patch.
        time: [B], 0 (clean) … 1000 (noise). text: see TextCondition; masked tokens influence nothing.
        rope_scale: divides visual positions on (t, h, w). attention: of the visual tokens to each other.
        cache: called as cache(blocks, tokens) in place of blocks(tokens), where blocks runs all visual blocks.

        Raises ValueError where a shape does not fit the config or the batch.
        """
        self._check(x, time, text)
        modulation = self._modulation(time, text.pooled)
        text_tokens = self._refine_text(text, modulation)
        text_mask = None if text.mask is None else text.mask[:, None, None]

        patches = patchify(x, self.config.patch_size)
        grid = (patches.shape[1], patches.shape[2], patches.shape[3])
        # For NABLA the tokens go into fractal order once, before the blocks, and their positions with them.
        layout = TokenLayout((grid,)) if attention.sparse else None
        rope = visual_rope(grid, self.config.axes_dims, rope_scale, x.device)
        if layout is not None:
            order = layout.permutation(x.device)
            rope = rope[0][order], rope[1][order]
        attend = _self_attention(attention, layout)

        def blocks(tokens: Tensor) -> Tensor:
            return self._visual_blocks(tokens, text_tokens, text_mask, modulation, rope, attend)

        tokens = self.visual_embeddings(patches.flatten(1, 3) if layout is None else fractal_flatten(patches, layout))
        tokens = blocks(tokens) if cache is None else cache(blocks, tokens)
        patches = self.out_layer(tokens, modulation)
        cells = patches.unflatten(1, grid) if layout is None else fractal_unflatten(patches, layout)
        assert isinstance(cells, Tensor)  # the layout is of one clip
        return unpatchify(cells, self.config.patch_size)

    def _modulation(self, time: Tensor, pooled_text: Tensor) -> Tensor:
        """What all blocks are modulated by: [B, time_dim], float32."""
        embedding = self.time_embeddings(time)
        return silu(embedding + self.pooled_text_embeddings(pooled_text).to(embedding.dtype))

    def _refine_text(self, text: TextCondition, modulation: Tensor) -> Tensor:
        tokens, mask = text.tokens, None
        if text.mask is not None:
            # Whatever lies in the padding, NaN included, must not reach 0 · value in attention.
            tokens, mask = tokens.masked_fill(~text.mask[..., None], 0), text.mask[:, None, None]
        tokens = self.text_embeddings(tokens)
        rope = text_rope(tokens.shape[1], self.config.head_dim, tokens.device)
        for block in self.text_transformer_blocks:
            tokens = block(tokens, modulation, rope, mask)
        return tokens

    def _visual_blocks(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: SelfAttend,
    ) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        with offload_saved_tensors() if recompute and self.offload else nullcontext():
            for block in self.visual_transformer_blocks:
                # Only the tokens are an argument: what all blocks share is not kept, or offloaded, once a block.
                if recompute:
                    tokens = checkpoint(
                        lambda tokens, block=block: block(tokens, text, text_mask, modulation, rope, attend),
                        tokens,
                        use_reentrant=False,
                    )
                else:
                    tokens = block(tokens, text, text_mask, modulation, rope, attend)
        return tokens

    def _check(self, x: Tensor, time: Tensor, text: TextCondition) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[-1] != config.input_channels:
            raise ValueError(f"x: expected [B, T, H, W, {config.input_channels}], got {list(x.shape)}")
        if any(side % patch for side, patch in zip(x.shape[1:4], config.patch_size, strict=True)):
            raise ValueError(
                f"x: expected T, H, W that are multiples of the patch {config.patch_size}, got {list(x.shape[1:4])}; "
                "crop or pad the latent"
            )
        if time.shape != x.shape[:1]:
            raise ValueError(f"time: expected one value a sample, [{x.shape[0]}], got {list(time.shape)}")
        if text.tokens.shape[0] != x.shape[0] or text.tokens.shape[2] != config.in_text_dim:
            raise ValueError(
                f"text tokens: expected [{x.shape[0]}, L, {config.in_text_dim}], got {list(text.tokens.shape)}"
            )
        if text.pooled.shape[1] != config.in_text_dim2:
            raise ValueError(
                f"pooled text: expected [{x.shape[0]}, {config.in_text_dim2}], got {list(text.pooled.shape)}"
            )
        if self.offload and not self.gradient_checkpointing:
            raise ValueError("offload moves the inputs of checkpointed blocks: set gradient_checkpointing = True too")


def _self_attention(attention: AttentionConfig, layout: TokenLayout | None) -> SelfAttend:
    return lambda q, k, v: run_attention(q, k, v, attention.engine, layout, attention.thr, attention.sta)


class TextBlock(nn.Module):
    """A block of the linguistic token refiner: self-attention and MLP, each modulated and gated."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.text_modulation = Modulation(config.time_dim, config.model_dim, 6)
        self.self_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run_attention(q, k, v, mask=mask)

        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.text_modulation(modulation)
        out = self.self_attention(layernorm_modulate(x, shift, scale, LAYERNORM_EPS), rope, attend)
        x = gated_residual(x, out, gate)
        out = self.feed_forward(layernorm_modulate(x, ff_shift, ff_scale, LAYERNORM_EPS))
        return gated_residual(x, out, ff_gate)


class VisualBlock(nn.Module):
    """A CrossDiT block: self-attention, cross-attention to the text and MLP, each modulated and gated."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        modulation: Tensor,
        rope: tuple[Tensor, Tensor],
        attend: SelfAttend,
    ) -> Tensor:
        parts = self.visual_modulation(modulation)
        shift, scale, gate, text_shift, text_scale, text_gate, ff_shift, ff_scale, ff_gate = parts
        out = self.self_attention(layernorm_modulate(x, shift, scale, LAYERNORM_EPS), rope, attend)
        x = gated_residual(x, out, gate)
        queries = layernorm_modulate(x, text_shift, text_scale, LAYERNORM_EPS)
        out = self.cross_attention.to_text(queries, text, text_mask)
        x = gated_residual(x, out, text_gate)
        out = self.feed_forward(layernorm_modulate(x, ff_shift, ff_scale, LAYERNORM_EPS))
        return gated_residual(x, out, ff_gate)


class Attention(nn.Module):
    """Projections and per-head RMSNorm of q and k, around self-attention or attention to the text."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.heads = config.heads
        self.to_query = nn.Linear(config.model_dim, config.model_dim)
        self.to_key = nn.Linear(config.model_dim, config.model_dim)
        self.to_value = nn.Linear(config.model_dim, config.model_dim)
        self.query_norm = nn.RMSNorm(config.head_dim)
        self.key_norm = nn.RMSNorm(config.head_dim)
        self.out_layer = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: SelfAttend) -> Tensor:
        """Self-attention of x [B, S, d] with rotary positions; attend takes q, k, v as [B, h, S, D]."""
        q, k, v = self._heads(self.to_query(x)), self._heads(self.to_key(x)), self._heads(self.to_value(x))
        q, k = qk_norm_rope(q, k, self.query_norm.weight, self.key_norm.weight, *rope, eps=RMSNORM_EPS)
        return self._merge(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))

    def to_text(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of x [B, S, d] to text [B, L, d]; mask: bool [B, 1, 1, L], True where a token may be read."""
        q = _rms_norm(self._heads(self.to_query(x)), self.query_norm.weight)
        k = _rms_norm(self._heads(self.to_key(text)), self.key_norm.weight)
        v = self._heads(self.to_value(text))
        out = run_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask)
        return self._merge(out)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _merge(self, heads: Tensor) -> Tensor:
        return self.out_layer(heads.transpose(1, 2).flatten(2))


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return rms_norm(x.to(wide), weight.shape, weight.to(wide), RMSNORM_EPS).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, GELU, Linear, without biases; each token alone."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.in_layer = nn.Linear(config.model_dim, config.ff_dim, bias=False)
        self.out_layer = nn.Linear(config.ff_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(gelu(self.in_layer(x)))


class Float32Linear(nn.Linear):
    """A Linear that stays in float32 when the model is cast to a narrower dtype, and under autocast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Linear":
        def at_least_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(at_least_float32, recurse)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.to(self.weight.dtype), self.weight, self.bias)


class Modulation(nn.Module):
    """Shift, scale and gate of each sub-block in turn; zero at first, so that a fresh block is the identity."""

    def __init__(self, time_dim: int, model_dim: int, parts: int):
        super().__init__()
        self.model_dim = model_dim
        self.out_layer = Float32Linear(time_dim, parts * model_dim)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """`parts` tensors [B, d] in float32; modulation: SiLU of the time embedding [B, time_dim]."""
        return self.out_layer(modulation).split(self.model_dim, dim=-1)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through an MLP, in float32 whatever the model's dtype."""

    def __init__(self, model_dim: int, time_dim: int):
        super().__init__()
        self.pairs = model_dim // 2
        self.in_layer = Float32Linear(model_dim, time_dim)
        self.out_layer = Float32Linear(time_dim, time_dim)

    def forward(self, time: Tensor) -> Tensor:
        """time [B] → [B, time_dim] float32."""
        angles = torch.outer(time.float(), frequencies(self.pairs, time.device))
        return self.out_layer(silu(self.in_layer(torch.cat([angles.cos(), angles.sin()], dim=-1))))


class TextEmbedding(nn.Module):
    """Linear and LayerNorm that bring text, tokens or pooled, to a width of the model."""

    def __init__(self, text_dim: int, out_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(text_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim, eps=LAYERNORM_EPS)

    def forward(self, text: Tensor) -> Tensor:
        text = self.in_layer(text.to(self.in_layer.weight.dtype))
        return self.norm(text).to(text.dtype)


class VisualEmbedding(nn.Module):
    """Linear from the latent cells of a patch to a token."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.in_layer = nn.Linear(config.patch_cells * config.input_channels, config.model_dim)

    def forward(self, patches: Tensor) -> Tensor:
        return self.in_layer(patches.to(self.in_layer.weight.dtype))


class OutLayer(nn.Module):
    """adaLN and a Linear to the patches' velocities."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.modulation = Modulation(config.time_dim, config.model_dim, 2)
        self.out_layer = nn.Linear(config.model_dim, config.patch_cells * config.out_visual_dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = self.modulation(modulation)
        return self.out_layer(layernorm_modulate(x, shift, scale, LAYERNORM_EPS))


def patchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, T, H, W, C] → [B, T/p, H/p, W/p, p·p·p·C], channels innermost."""
    t, h, w = patch
    x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def unpatchify(patches: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, T/p, H/p, W/p, C·p·p·p] → [B, T, H, W, C]; channels outermost in a patch, as the released weights give."""
    x = patches.unflatten(4, (-1, *patch))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)
