"""CrossDiT: the diffusion transformer of Kandinsky 5.0 (§5.2–5.3), on k5kernels' operators.

    text tokens  → Linear, LayerNorm → LTF blocks (self-attention, MLP)          ┐ keys and values
    pooled text  → Linear, LayerNorm ─┐                                          │
    time         → sinusoids, MLP ────┴→ time embedding → modulation of a block ─┤
    latent patch → Linear → visual blocks (self-attention, cross-attention, MLP) ┴→ adaLN → Linear → velocity

The model takes tokens and a TokenLayout, which says which clips the sequence holds and in which order their tokens are:
several clips of different sizes can be packed in one sequence (§6.1.2). Each clip has its own time and text, and no
token attends to another clip. `model.latent_tokens` makes tokens of latents.

Parameter names and shapes are those of the released weights in diffusers' layout.

Shapes: B batch, S visual tokens, L text tokens, d model width, h heads, D head dim. N = B · clips: what there is one of
for every clip has N rows, those of the first sample first.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm, silu
from torch.utils.checkpoint import checkpoint

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.attention import attention as run_attention
from k5kernels.offload import ActivationOffload
from k5kernels.ops.gated_residual import gated_residual
from k5kernels.ops.layernorm_modulate import layernorm_modulate
from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope
from k5kernels.presets import CrossDiTConfig
from k5kernels.profiling import stage
from k5kernels.text_condition import TextCondition
from k5kernels.token_layout import TokenLayout
from model.linear import Linear
from model.rope import frequencies, text_rope, visual_rope
from model.sequence_piece import Attend, Exchange, sequence_piece

Blocks = Callable[[Tensor], Tensor]
Cache = Callable[[Blocks, Tensor], Tensor]


class VisualContext(NamedTuple):
    """What every visual block of a pass is given beside its tokens.

    A tuple, so that FSDP finds the tensors in it: it frees a block's weights once all inputs have their gradients.

    layout: of the tokens. attention: how they attend to each other. rope: (cos, sin), each [S, D/2].
    text: [N, L, d]. text_mask: bool [N, 1, 1, L], True where a text token may be read; None where all may.
    modulation: SiLU of the time embedding, [N, time_dim] float32.
    exchange, whole: where processes share the sequence, all of the above is of this process's piece, and `whole` is
    the layout of the sequence that self-attention sees.
    """

    layout: TokenLayout
    attention: AttentionConfig
    rope: tuple[Tensor, Tensor]
    text: Tensor
    text_mask: Tensor | None
    modulation: Tensor
    exchange: Exchange | None = None
    whole: TokenLayout | None = None


class CrossDiT(nn.Module):
    """The velocity of noisy tokens, given time and text.

    gradient_checkpointing: recompute each visual block in the backward instead of keeping its activations.
    offload: keeps the visual blocks' inputs (without gradient_checkpointing: all that they save) away until shortly
    before the backward asks for them (§6.1); None keeps them here.
    exchange: for processes that share each sequence: each computes its piece of the tokens, and all get the velocity
    of the whole.
    Compiled, it is one graph for clips of every length and size; docs/design.md says how.
    """

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.offload: ActivationOffload | None = None
        self.exchange: Exchange | None = None
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
        layout: TokenLayout,
        *,
        rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
        attention: AttentionConfig = DENSE,
        cache: Cache | None = None,
    ) -> Tensor:
        """velocity [B, S, patch_cells · out_visual_dim], in the dtype the model computes in.

        x: [B, S, patch_cells · input_channels], the patch of each token, in the layout's order. layout: the clips of
        the sequence; all samples of a batch hold the same. time: [N], 0 (clean) … 1000 (noise). text: N entries, see
        TextCondition; masked tokens have no influence. rope_scale: divides visual positions on (t, h, w).
        attention: of the visual tokens to those of their clip. cache: called as cache(blocks, tokens) in place of
        blocks(tokens), where blocks runs all visual blocks.

        Raises ValueError where a shape does not fit the config, the layout or the batch.
        """
        self._check(x, time, text, layout)
        whole, rope = layout, visual_rope(layout, self.config.axes_dims, rope_scale, x.device)
        if self.exchange is not None:
            piece = sequence_piece(whole, self.exchange.rank, self.exchange.ranks)
            x, time, layout = x[:, piece.tokens], piece.rows(time), piece.layout
            mask = None if text.mask is None else piece.rows(text.mask)
            text = TextCondition(piece.rows(text.tokens), mask, piece.rows(text.pooled))
            rope = rope[0][piece.tokens], rope[1][piece.tokens]
        with stage("text and time"):
            modulation = self._modulation(time, text.pooled)
            context = VisualContext(
                layout,
                attention,
                rope,
                text=self._refine_text(text, modulation),
                text_mask=None if text.mask is None else text.mask[:, None, None],
                modulation=modulation,
                exchange=self.exchange,
                whole=whole,
            )

        def blocks(tokens: Tensor) -> Tensor:
            return self._visual_blocks(tokens, context)

        tokens = self.visual_embeddings(x)
        tokens = blocks(tokens) if cache is None else cache(blocks, tokens)
        velocity = self.out_layer(tokens, modulation, layout)
        return velocity if self.exchange is None else self.exchange.gather(velocity, whole.tokens)

    def _modulation(self, time: Tensor, pooled_text: Tensor) -> Tensor:
        """What all blocks are modulated by: [N, time_dim], float32."""
        embedding = self.time_embeddings(time)
        return silu(embedding + self.pooled_text_embeddings(pooled_text).to(embedding.dtype))

    def _refine_text(self, text: TextCondition, modulation: Tensor) -> Tensor:
        """The text tokens behind the LTF blocks: [N, L, d]."""
        tokens, mask = text.tokens, None
        if text.mask is not None:
            # Attention multiplies a masked value by 0, which leaves NaN as it is: padding is cleared first.
            tokens, mask = tokens.masked_fill(~text.mask[..., None], 0), text.mask[:, None, None]
        tokens = self.text_embeddings(tokens)
        rope = text_rope(tokens.shape[1], self.config.head_dim, tokens.device)
        for block in self.text_transformer_blocks:
            tokens = block(tokens, modulation, rope, mask)
        return tokens

    def _visual_blocks(self, tokens: Tensor, context: VisualContext) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        with nullcontext() if self.offload is None else self.offload:
            for block in self.visual_transformer_blocks:
                # The tokens alone are an argument of the recomputed function: a checkpoint saves its arguments, and
                # the context, which all blocks share, would be saved and offloaded once a block.
                with stage("visual block"):
                    if recompute:
                        tokens = checkpoint(
                            lambda tokens, block=block: block(tokens, context), tokens, use_reentrant=False
                        )
                    else:
                        tokens = block(tokens, context)
        return tokens

    def _check(self, x: Tensor, time: Tensor, text: TextCondition, layout: TokenLayout) -> None:
        config = self.config
        width = config.patch_cells * config.input_channels
        if x.ndim != 3 or x.shape[1:] != (layout.tokens, width):
            raise ValueError(f"x: expected [B, {layout.tokens}, {width}] for this layout, got {list(x.shape)}")
        rows = x.shape[0] * len(layout.clips)
        if time.shape != (rows,):
            raise ValueError(f"time: expected one value for each clip of each sample, [{rows}], got {list(time.shape)}")
        if text.tokens.shape[0] != rows or text.tokens.shape[2] != config.in_text_dim:
            raise ValueError(f"text tokens: expected [{rows}, L, {config.in_text_dim}], got {list(text.tokens.shape)}")
        if text.pooled.shape[1] != config.in_text_dim2:
            raise ValueError(f"pooled text: expected [{rows}, {config.in_text_dim2}], got {list(text.pooled.shape)}")


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
        out = self.self_attention(layernorm_modulate(x, shift, scale), rope, attend)
        x = gated_residual(x, out, gate)
        out = self.feed_forward(layernorm_modulate(x, ff_shift, ff_scale))
        return gated_residual(x, out, ff_gate)


class VisualBlock(nn.Module):
    """A CrossDiT block: self-attention, cross-attention to the text and MLP, each modulated and gated."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.visual_modulation = Modulation(config.time_dim, config.model_dim, 9)
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, context: VisualContext) -> Tensor:
        """x: [B, S, d] → [B, S, d]."""
        layout, attention = context.layout, context.attention
        whole, exchange = context.whole or layout, context.exchange

        def attend_whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run_attention(q, k, v, attention.engine, whole, attention.thr, attention.sta)

        attend = attend_whole if exchange is None else exchange.around(attend_whole, whole.tokens)
        parts = self.visual_modulation(context.modulation)
        shift, scale, gate, text_shift, text_scale, text_gate, ff_shift, ff_scale, ff_gate = parts
        with stage("self-attention"):
            out = self.self_attention(layernorm_modulate(x, shift, scale, layout=layout), context.rope, attend)
            x = gated_residual(x, out, gate, layout)
        with stage("cross-attention"):
            queries = layernorm_modulate(x, text_shift, text_scale, layout=layout)
            x = gated_residual(x, self.cross_attention.to_text(queries, context), text_gate, layout)
        with stage("feed-forward"):
            out = self.feed_forward(layernorm_modulate(x, ff_shift, ff_scale, layout=layout))
            return gated_residual(x, out, ff_gate, layout)


class Attention(nn.Module):
    """Projections and per-head RMSNorm of q and k, around self-attention or attention to the text."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.heads = config.heads
        self.to_query = Linear(config.model_dim, config.model_dim)
        self.to_key = Linear(config.model_dim, config.model_dim)
        self.to_value = Linear(config.model_dim, config.model_dim)
        self.query_norm = nn.RMSNorm(config.head_dim)
        self.key_norm = nn.RMSNorm(config.head_dim)
        self.out_layer = Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Self-attention of x [B, S, d] with rotary positions; attend takes q, k, v as [B, h, S, D]."""
        q, k, v = self._heads(self.to_query(x)), self._heads(self.to_key(x)), self._heads(self.to_value(x))
        q, k = qk_norm_rope(q, k, self.query_norm.weight, self.key_norm.weight, *rope)
        return self._merge(attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))

    def to_text(self, x: Tensor, context: VisualContext) -> Tensor:
        """Attention of x [B, S, d] to the text of each token's clip."""
        text = context.text
        q = _rms_norm(self._heads(self.to_query(x)), self.query_norm.weight)
        k = _rms_norm(self._heads(self.to_key(text)), self.key_norm.weight)
        v = self._heads(self.to_value(text))
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self._merge(_attend_per_clip(*heads, context.text_mask, context.layout))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def _merge(self, heads: Tensor) -> Tensor:
        return self.out_layer(heads.transpose(1, 2).flatten(2))


def _attend_per_clip(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: TokenLayout) -> Tensor:
    """Attention of the clips in q [B, h, S, D] each to its own row of k and v [N, h, L, D]; mask: [N, 1, 1, L]."""
    clips = len(layout.clips)
    if clips == 1:
        return run_attention(q, k, v, mask=mask)
    outs = []
    for clip, queries in enumerate(q.split([T * H * W for T, H, W in layout.clips], dim=2)):
        rows = slice(clip, None, clips)
        outs.append(run_attention(queries, k[rows], v[rows], mask=None if mask is None else mask[rows]))
    return torch.cat(outs, dim=2)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return rms_norm(x.to(wide), weight.shape, weight.to(wide), EPS).to(x.dtype)


class FeedForward(nn.Module):
    """Linear, GELU, Linear, without biases; each token alone."""

    def __init__(self, config: CrossDiTConfig):
        super().__init__()
        self.in_layer = Linear(config.model_dim, config.ff_dim, bias=False)
        self.out_layer = Linear(config.ff_dim, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.in_layer(x, gelu=True))


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


class ZeroLinear(Float32Linear):
    """A Float32Linear of zeros at first."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # draws: the weights that a seed gives the layers behind this one depend on it
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Modulation(nn.Module):
    """Shift, scale and gate of each sub-block in turn; zero at first, so that a fresh block is the identity."""

    def __init__(self, time_dim: int, model_dim: int, parts: int):
        super().__init__()
        self.model_dim = model_dim
        self.out_layer = ZeroLinear(time_dim, parts * model_dim)

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
        self.norm = nn.LayerNorm(out_dim)

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

    def forward(self, x: Tensor, modulation: Tensor, layout: TokenLayout) -> Tensor:
        shift, scale = self.modulation(modulation)
        return self.out_layer(layernorm_modulate(x, shift, scale, layout=layout))
