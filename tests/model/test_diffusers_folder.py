"""What was trained here runs in diffusers' own pipeline, with our sampler's result."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from small_crossdit import inputs, relative_difference
from torch import Tensor

from k5kernels.text_condition import TextCondition
from model.diffusers_folder import export_transformer
from model.nano import CROSSDIT_WEIGHTS, load_settings
from model.sampler import sample
from model.weights import load_crossdit


def pipeline(folder: Any, shift: float) -> Kandinsky5T2VPipeline:
    transformer = Kandinsky5Transformer3DModel.from_pretrained(folder)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    # The released grid of times, evenly spaced before the shift; the pipeline's own ends one step earlier.
    set_timesteps = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device: set_timesteps(
        sigmas=[1 - step / steps for step in range(steps)], device=device
    )
    pipe = Kandinsky5T2VPipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    pipe: Kandinsky5T2VPipeline, text: TextCondition, negative: TextCondition, noise: Tensor, **given: Any
) -> Tensor:
    _, T, H, W, _ = noise.shape
    lengths = {
        "prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
        "negative_prompt_cu_seqlens": torch.tensor([0, negative.tokens.shape[1]]),
    }
    return pipe(
        prompt_embeds_qwen=text.tokens, prompt_embeds_clip=text.pooled, negative_prompt_embeds_qwen=negative.tokens,
        negative_prompt_embeds_clip=negative.pooled, height=8 * H, width=8 * W, num_frames=1 + 4 * (T - 1),
        latents=noise, output_type="latent", negative_prompt=[""], prompt=[""], **lengths, **given,
    ).frames  # fmt: skip


def test_the_nano_model_gives_our_samplers_latent_in_the_stock_pipeline(tmp_path):
    model, settings = load_crossdit(CROSSDIT_WEIGHTS), load_settings()
    export_transformer(model, tmp_path)
    shape, steps = (1, 2, 8, 12, 16), 4
    (_, _, text), (_, _, negative) = (inputs(1, (2, 8, 12), model.config, seed=seed) for seed in (1, 2))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    pipe = pipeline(tmp_path, settings.scheduler_scale)
    scale = pipe._get_scale_factor(64, 96)
    theirs = run(
        pipe, text, negative, torch.cat([noise, torch.zeros(1, 2, 8, 12, 17)], dim=-1), num_inference_steps=steps,
        guidance_scale=settings.guidance,
    )  # fmt: skip
    ours = sample(
        model, text, negative, shape, steps=steps, guidance=settings.guidance, scheduler_scale=settings.scheduler_scale,
        seed=3, rope_scale=tuple(scale),
    )  # fmt: skip
    # diffusers rounds q and k to bfloat16 after the rotary embedding.
    assert relative_difference(theirs, ours) < 1e-2
