"""Small models and pipelines of Kandinsky 5 in diffusers, calls of them, and what must be as before afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from small_crossdit import inputs
from torch import Tensor, nn

from k5kernels.text_condition import TextCondition

ROPE_SCALE = (1.0, 2.0, 3.16)
GRID = (3, 10, 36)  # latent frames, height and width: 5×18 tokens, no multiple of 8


@torch.no_grad()
def run(model: Any, batch: int = 1, grid: tuple[int, int, int] = GRID, time: float | None = None) -> Tensor:
    x, times, text = inputs(batch, grid)
    return call(model, x, times if time is None else torch.full((batch,), time), text)


def call(model: Any, x: Tensor, time: Tensor, text: TextCondition) -> Tensor:
    positions = [torch.arange(side) for side in (x.shape[1], x.shape[2] // 2, x.shape[3] // 2)]
    return model(
        hidden_states=x, encoder_hidden_states=text.tokens, timestep=time, pooled_projections=text.pooled,
        visual_rope_pos=positions, text_rope_pos=torch.arange(text.tokens.shape[1]), scale_factor=ROPE_SCALE,
    ).sample  # fmt: skip


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module and processor, by identity."""
    found = {}
    for name, module in model.named_modules():
        found[f"{name}.__class__"] = type(module)
        for key, value in vars(module).items():
            inside = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
            found[f"{name}.{key}"] = inside
        if (processor := getattr(module, "processor", None)) is not None:
            found[f"{name}.processor.__dict__"] = dict(vars(processor))
    return found


@contextmanager
def leaves_no_trace_of(model: nn.Module, run: Callable[[Any], Tensor]) -> Iterator[None]:
    before, out = snapshot(model), run(model)
    yield
    assert snapshot(model) == before
    assert torch.equal(run(model), out)


def pipeline(transformer: Kandinsky5Transformer3DModel, attention_type: str) -> Kandinsky5T2VPipeline:
    transformer.register_to_config(attention_type=attention_type)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = Kandinsky5T2VPipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Kandinsky5T2VPipeline, height: int, width: int, output_type: str = "latent") -> Tensor:
    """Two steps without guidance."""
    _, _, text = inputs(1, GRID)
    given = {
        "prompt_embeds_qwen": text.tokens,
        "prompt_embeds_clip": text.pooled,
        "prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
    }
    return pipe(
        height=height, width=width, num_frames=5, num_inference_steps=2, guidance_scale=1.0, output_type=output_type,
        generator=torch.Generator().manual_seed(0), **given,
    ).frames  # fmt: skip
