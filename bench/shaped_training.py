"""The trainer on noise, with blocks whose attention has a shape: for benchmarks of its whole step.

Needs the packages of the trainer, which a benchmark of kernels does not.
"""

from fractions import Fraction

import torch

from bench.shaped_block import TEXT_TOKENS, shaped_block
from k5kernels.attention import AttentionConfig
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample
from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.latents import LatentSet
from train.loop import Loop
from train.schedule import Schedule

SMALL_RATE = 1e-12  # of learning: all steps see the same weights, and the work is that of any other rate


def shaped_loop(
    config: CrossDiTConfig,
    clip: tuple[int, int, int],
    device: torch.device,
    attention: AttentionConfig,
    *,
    bf16: bool = False,
    offload: ActivationOffload | None = None,
    learning_rate: float = 1e-4,
) -> Loop:
    """The trainer, checkpointing, on one clip of noise of this many tokens. Two of them take the same steps."""
    T, H, W = clip[0], 2 * clip[1], 2 * clip[2]
    latent = torch.randn(config.in_visual_dim, T, H, W, generator=torch.Generator().manual_seed(0)).half()
    data = LatentSet([Sample("noise", latent, ClipRecord(4 * T - 3, 8 * H, 8 * W, Fraction(24), "noise", 0))], None)
    text = torch.randn(1, TEXT_TOKENS, config.in_text_dim, generator=torch.Generator().manual_seed(1)).to(device)
    condition = TextCondition(text, None, text.mean(1))
    torch.manual_seed(0)
    model = CrossDiT(config)
    for seed, block in enumerate(model.visual_transformer_blocks):
        block.load_state_dict(shaped_block(config, seed).state_dict())
    model.gradient_checkpointing, model.offload = True, offload
    settings = FlowMatching(attention=attention, bf16=bf16, learning_rate=learning_rate)
    stage = CrossDiTStage(model.to(device), data, lambda captions: condition, settings)
    return Loop(stage, Schedule(steps=1 << 20, warmup_steps=2))
