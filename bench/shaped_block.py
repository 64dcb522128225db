"""A visual block whose weights give attention a shape: near tokens attend to each other most, as in a trained model.

With weights at random NABLA would keep most blocks, and a benchmark of it would mean nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from k5kernels import TokenLayout, nabla_mask
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.ops.layernorm_modulate import layernorm_modulate
from k5kernels.presets import CrossDiTConfig
from model.crossdit import VisualBlock, VisualContext
from model.rope import visual_rope

# How far queries and keys of a head stand from its direction, against the length of that direction.
DIRECTION, NOISE = 1.6, 0.7
ROPE_SCALE = (1.0, 2.0, 2.0)
TEXT_TOKENS = 224
MODULATION = 0.2  # standard deviation of scales and shifts; gates stand around 1


def shaped_block(config: CrossDiTConfig, seed: int = 0) -> VisualBlock:
    """A block of random weights, but for the queries and keys of self-attention: a token's are the head's direction
    and, less far, what the token says, so that the rotary embedding decides how much two tokens attend."""
    random = torch.Generator().manual_seed(seed)
    block = VisualBlock(config)
    d, h, D = config.model_dim, config.heads, config.head_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    with torch.no_grad():
        for layer in (layer for layer in block.modules() if isinstance(layer, nn.Linear)):
            layer.weight.copy_(normal(*layer.weight.shape) * layer.weight.shape[1] ** -0.5)
            if layer.bias is not None:
                layer.bias.zero_()
        direction = (DIRECTION * normal(h, D)).flatten()
        attention = block.self_attention
        for layer, norm in (
            (attention.to_query, attention.query_norm),
            (attention.to_key, attention.key_norm),
        ):
            layer.weight.mul_(NOISE)
            layer.bias.copy_(direction)
            norm.weight.fill_((DIRECTION**2 + NOISE**2) ** 0.5)
        modulation = block.visual_modulation.out_layer
        modulation.weight.mul_(MODULATION)
        for gate in (2, 5, 8):
            modulation.bias[gate * d : (gate + 1) * d] = 1
    return block


@dataclass(frozen=True)
class BlockInputs:
    """x: tokens [1, S, d]. time: embedding before its SiLU, [1, time_dim]. text: [1, L, d]. rope: (cos, sin)."""

    x: Tensor
    time: Tensor
    text: Tensor
    rope: tuple[Tensor, Tensor]
    layout: TokenLayout

    def context(self, attention: AttentionConfig = DENSE) -> VisualContext:
        return VisualContext(self.layout, attention, self.rope, self.text, None, silu(self.time))


def block_inputs(
    config: CrossDiTConfig, layout: TokenLayout, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> BlockInputs:
    random = torch.Generator(device or "cpu").manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    return BlockInputs(
        normal(1, layout.tokens, config.model_dim).to(dtype),
        normal(1, config.time_dim),
        normal(1, TEXT_TOKENS, config.model_dim).to(dtype),
        visual_rope(layout, config.axes_dims, ROPE_SCALE, device),
        layout,
    )


@torch.no_grad()
def density(block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig) -> float:
    """Of the mask that the block's self-attention makes of its tokens."""
    masks: list[float] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks.append(nabla_mask(q, k, inputs.layout, attention.thr, attention.sta).density)
        return v

    context = inputs.context(attention)
    shift, scale, *_ = block.visual_modulation(context.modulation)
    block.self_attention(layernorm_modulate(inputs.x, shift, scale, layout=inputs.layout), inputs.rope, attend)
    return masks[0]
