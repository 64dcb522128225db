"""A CrossDiT stage small enough to train in a test."""

import torch
from latent_samples import sample

from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.latents import LatentSet
from train.loop import Loop
from train.schedule import Schedule

CPU = torch.device("cpu")
TINY = CrossDiTConfig(
    model_dim=32,
    time_dim=16,
    ff_dim=64,
    text_blocks=1,
    visual_blocks=2,
    axes_dims=(4, 6, 6),
    in_text_dim=8,
    in_text_dim2=8,
)


def encode_text(captions: list[str]) -> TextCondition:
    tokens = torch.stack([torch.full((2, 8), float(len(caption))) for caption in captions])
    return TextCondition(tokens, None, tokens.mean(1))


def tiny_stage(device: torch.device = CPU, samples=None, **settings) -> CrossDiTStage:
    """samples: the data, three clips where None. settings: of FlowMatching."""
    torch.manual_seed(0)
    data = LatentSet(samples or [sample("a.mp4", (2, 4, 4), i) for i in range(3)], {"a": "words"})

    def encode(captions: list[str]) -> TextCondition:
        text = encode_text(captions)
        return TextCondition(text.tokens.to(device), None, text.pooled.to(device))

    return CrossDiTStage(CrossDiT(TINY).to(device), data, encode, FlowMatching(**settings))


def tiny_loop(steps: int = 8, device: torch.device = CPU, **settings) -> Loop:
    """settings: of FlowMatching."""
    return Loop(tiny_stage(device, **settings), Schedule(steps, warmup_steps=2))


def parameters(loop: Loop) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in loop.stage.model.parameters()])
