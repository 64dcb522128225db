"""The models of diffusers whose self-attention over visual tokens we can run, and how each of them does it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k5kernels.ops.qk_norm_rope import EPS, qk_norm_rope

Grid = tuple[int, int, int]
Heads = tuple[Tensor, Tensor, Tensor]


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be replaced; the message says why and which can."""


@dataclass(frozen=True)
class Family:
    """How a class of models calls its self-attention.

    attentions: the modules that attend over visual tokens, layer by layer. arguments: of their processors, after the
    module and the tokens. rotations: the name of the one that has the positions. time_axis: of the model's input; then
    come height and width. rope: cos and sin of the positions, each [S, D/2]. heads: q, k and v, each [B, S, h, D], of
    the tokens. project: what stands after attention. blocks: the lists that a cache goes around. sparse_itself: whether
    the model's own attention is NABLA, over tokens in fractal order. orders_tokens: whether it can put them in that
    order, told by its argument `sparse_params`. joint: whether its attention is over the text too. pixels: of the side
    of a cell of its latents. zero_shot: why nobody promises that sparse attention keeps the quality; empty where the
    model was trained with it.
    """

    attentions: Callable[[Any], list[Any]]
    arguments: tuple[str, ...]
    rotations: str
    time_axis: int
    rope: Callable[[Any], tuple[Tensor, Tensor]]
    heads: Callable[[Any, Tensor, Tensor, Tensor], Heads]
    project: Callable[[Any, Tensor], Tensor]
    blocks: tuple[str, ...]
    sparse_itself: bool = False
    orders_tokens: bool = False
    joint: bool = False
    pixels: int = 8
    zero_shot: str = ""

    def latents(self, hidden_states: Tensor) -> Grid:
        """(T, H, W) of the model's input."""
        T, H, W = hidden_states.shape[self.time_axis : self.time_axis + 3]
        return T, H, W

    def grid(self, model: Any, hidden_states: Tensor) -> Grid:
        """The tokens (T, H, W) of a pass."""
        T, H, W = (side // patch for side, patch in zip(self.latents(hidden_states), _patch(model.config), strict=True))
        return T, H, W

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        """Why a call with these arguments is not one of ours; None where it is."""
        if given.get(self.rotations) is None:
            return "not self-attention with positions"
        if self.joint:
            return "not joint attention" if given.get("encoder_hidden_states") is None else None
        others = {name for name in self.arguments if name not in (self.rotations, "rotary_emb_kv", "sparse_params")}
        given_too = sorted(name for name in others if given.get(name) is not None)
        return f"not plain self-attention: it has {', '.join(given_too)}" if given_too else None


def family_of(model: Any) -> Family:
    """Of a transformer of diffusers, compiled or not; UnsupportedModelError where it is none of ours."""
    name = type(model).__name__
    if (family := FAMILIES.get(name)) is not None:
        return family
    reason = REFUSED.get(name, "the order and the roles of its tokens are not known here")
    raise UnsupportedModelError(f"target: expected a pipeline with one of {', '.join(FAMILIES)}, got {name}: {reason}")


def uncompiled(model: Any) -> Any:
    """The module itself of one that torch.compile wrapped."""
    return getattr(model, "_orig_mod", model)


def _patch(config: Any) -> Grid:
    """The latent cells (T, H, W) of a token."""
    if hasattr(config, "patch_size_t"):
        return config.patch_size_t, config.patch_size, config.patch_size
    return tuple(config.patch_size)


def _rotation_matrices(rotations: Tensor) -> tuple[Tensor, Tensor]:
    """Of [.., S, 1, D/2, 2, 2], the same for all samples."""
    rotations = rotations.reshape(-1, *rotations.shape[-5:])[0] if rotations.ndim > 5 else rotations
    cos, sin = (rotations[:, 0, :, row, 0] for row in (0, 1))
    return cos, sin


def _interleaved(rotations: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of two [1, S, 1, D] in which every value stands twice."""
    return rotations[0][0, :, 0, 0::2], rotations[1][0, :, 0, 1::2]


def _kandinsky_heads(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    q, k, v = (layer(x).unflatten(-1, (attn.num_heads, -1)) for layer in (attn.to_query, attn.to_key, attn.to_value))
    # On the device of q also where offloading keeps the weights elsewhere.
    weights = attn.query_norm.weight.to(q.device), attn.key_norm.weight.to(q.device)
    q, k = qk_norm_rope(q, k, *weights, cos, sin, EPS)
    return q, k, v


def _wan_heads(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in (attn.norm_q(q), attn.norm_k(k), v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels of [B, S, h, D] by the angles of [S, D/2]."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def _hunyuan_heads(attn: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Heads:
    q, k, v = (layer(x).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
    q, k = (part if norm is None else norm(part) for part, norm in ((q, attn.norm_q), (k, attn.norm_k)))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _hunyuan_project(attn: Any, x: Tensor) -> Tensor:
    """Blocks with one stream for both project later."""
    return x if getattr(attn, "to_out", None) is None else _wan_project(attn, x)


def _wan_project(attn: Any, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _kandinsky(**differences: Any) -> Family:
    settings: dict[str, Any] = {
        "attentions": lambda model: [block.self_attention for block in model.visual_transformer_blocks],
        "arguments": ("encoder_hidden_states", "rotary_emb", "sparse_params"),
        "rotations": "rotary_emb",
        "time_axis": 1,
        "rope": _rotation_matrices,
        "heads": _kandinsky_heads,
        "project": lambda attn, x: attn.out_layer(x),
        "blocks": ("visual_transformer_blocks",),
    }
    return Family(**settings | differences)


FAMILIES = {
    "Kandinsky5Transformer3DModel": _kandinsky(orders_tokens=True),
    "Kandinsky6Transformer3DModel": _kandinsky(
        attentions=lambda model: [block.video_dec_block.self_attention for block in model.visual_transformer_blocks],
        arguments=("encoder_hidden_states", "rotary_emb", "rotary_emb_kv", "attn_mask"),
        zero_shot="Kandinsky 6 was trained with dense attention",
    ),
    "Kandinsky6SRTransformer3DModel": _kandinsky(
        arguments=("rotary_emb", "sparse_params"), sparse_itself=True, pixels=16
    ),
    "WanTransformer3DModel": Family(
        attentions=lambda model: [block.attn1 for block in model.blocks],
        arguments=("encoder_hidden_states", "attention_mask", "rotary_emb"),
        rotations="rotary_emb",
        time_axis=2,
        rope=_interleaved,
        heads=_wan_heads,
        project=_wan_project,
        blocks=("blocks",),
        zero_shot="Wan was trained with dense attention; there are NABLA finetunes of Wan 2.1 14B",
    ),
    "HunyuanVideoTransformer3DModel": Family(
        attentions=lambda model: [
            block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)
        ],
        arguments=("encoder_hidden_states", "attention_mask", "image_rotary_emb"),
        rotations="image_rotary_emb",
        time_axis=2,
        rope=lambda rotations: (rotations[0][:, 0::2], rotations[1][:, 0::2]),
        heads=_hunyuan_heads,
        project=_hunyuan_project,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        joint=True,
        zero_shot="HunyuanVideo was trained with dense attention",
    ),
}
JOINT = (
    "its attention is over visual and text tokens together, in an order that is not known here; its blocks can be "
    "cached: attention=None"
)
REFUSED = {"HunyuanVideo15Transformer3DModel": JOINT, "HunyuanVideoFramepackTransformer3DModel": JOINT}
