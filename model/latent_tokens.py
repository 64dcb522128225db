"""Latents to the tokens that CrossDiT takes, and back: patchify, and the order of a TokenLayout (§5.2, §5.4).

A patch is the p_t×p_h×p_w latent cells that make one token: 1×2×2 in the released models. Its channels are innermost in
the model's input and outermost in its output; the released weights are trained that way.

Shapes: B batch, T, H, W frames, rows and columns of a latent, C channels, S tokens.
"""

from collections.abc import Sequence

from torch import Tensor

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.ops.fractal import fractal_flatten, fractal_unflatten
from k5kernels.text_condition import TextCondition
from k5kernels.token_layout import TokenLayout
from model.crossdit import Cache, CrossDiT

Patch = tuple[int, int, int]
ROW_MAJOR = 1  # side of a block at which the tokens of a frame are in row-major order


def latent_velocity(
    model: CrossDiT,
    x: Tensor,
    time: Tensor,
    text: TextCondition,
    *,
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    attention: AttentionConfig = DENSE,
    cache: Cache | None = None,
) -> Tensor:
    """The model's velocity of a batch of latents of one size: [B, T, H, W, out_visual_dim].

    x: [B, T, H, W, input_channels], sides multiples of config.patch_size. time: [B]. The rest as in `CrossDiT.forward`.

    Raises ValueError where a shape does not fit the model or the batch.
    """
    config = model.config
    if x.ndim != 5 or x.shape[-1] != config.input_channels:
        raise ValueError(f"x: expected [B, T, H, W, {config.input_channels}], got {list(x.shape)}")
    layout = layout_for([x], config.patch_size, attention)
    tokens = to_tokens([x], layout, config.patch_size)
    velocity = model(tokens, time, text, layout, rope_scale=rope_scale, attention=attention, cache=cache)
    return from_tokens(velocity, layout, config.patch_size)[0]


def layout_for(latents: Sequence[Tensor], patch_size: Patch, attention: AttentionConfig) -> TokenLayout:
    """The layout of these latents [B, T_i, H_i, W_i, C] in one sequence: a clip each.

    Fractal order for a sparse engine, which reads blocks of 8×8 tokens; row-major order for a dense one.

    Raises ValueError where a side is not a multiple of the patch's.
    """
    for x in latents:
        if any(side % patch for side, patch in zip(x.shape[1:4], patch_size, strict=True)):
            raise ValueError(
                f"x: expected T, H, W that are multiples of the patch {patch_size}, got {list(x.shape[1:4])}; "
                "crop or pad the latent"
            )
    t, h, w = patch_size
    grids = tuple((x.shape[1] // t, x.shape[2] // h, x.shape[3] // w) for x in latents)
    return TokenLayout(grids) if attention.sparse else TokenLayout(grids, ROW_MAJOR)


def to_tokens(latents: Sequence[Tensor], layout: TokenLayout, patch_size: Patch) -> Tensor:
    """One sequence of the patches of all latents, in the layout's order: [B, S, p_t·p_h·p_w·C].

    latents: [B, T_i, H_i, W_i, C], one for each clip of the layout.
    """
    return fractal_flatten([patchify(x, patch_size) for x in latents], layout)


def from_tokens(tokens: Tensor, layout: TokenLayout, patch_size: Patch) -> list[Tensor]:
    """The latents of a sequence [B, S, C·p_t·p_h·p_w], one for each clip of the layout: [B, T_i, H_i, W_i, C]."""
    patches = fractal_unflatten(tokens, layout)
    return [unpatchify(clip, patch_size) for clip in ([patches] if isinstance(patches, Tensor) else patches)]


def patchify(x: Tensor, patch_size: Patch) -> Tensor:
    """[B, T, H, W, C] → [B, T/p_t, H/p_h, W/p_w, p_t·p_h·p_w·C], channels innermost."""
    t, h, w = patch_size
    x = x.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, t))
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


def unpatchify(patches: Tensor, patch_size: Patch) -> Tensor:
    """[B, T/p_t, H/p_h, W/p_w, C·p_t·p_h·p_w] → [B, T, H, W, C], from channels outermost."""
    x = patches.unflatten(4, (-1, *patch_size))
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(5, 6).flatten(3, 4).flatten(1, 2)
