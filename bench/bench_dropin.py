"""The drop-in in diffusers' Kandinsky 5 pipeline with the nano weights, against stock and against other caches."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    MagCacheConfig,
)
from torch import Tensor

from bench.stock_vae import stock_vae
from k5kernels.cache import MagCache
from k5kernels.integrations.diffusers import accelerate
from k5kernels.integrations.diffusers.caching import EXTRAPOLATE
from k5kernels.latents.video import to_frames
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae.weights import load_decoder, load_encoder
from model.diffusers_folder import export_transformer
from model.nano import CROSSDIT_WEIGHTS, VAE_WEIGHTS, load_settings
from model.weights import load_crossdit
from train.evaluation import psnr

STEPS, SMALL, CACHE_ROUNDS = 50, (128, 192, 9), 3  # height, width, frames
WHOLE_STEPS, WHOLE, WHOLE_ROUNDS = 20, (256, 384, 17), 2
PROMPT = "A big grey rabbit stands in a green meadow."
MOST_BY_TWO = 2.5  # passes for a computed one
# PSNR is of decoded frames to those of the uncached run.
FLOOR_WHOLE, FLOOR_CACHE, FLOOR_DB = 3.0, 2.0, 40.0


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("nano")
    export_transformer(load_crossdit(CROSSDIT_WEIGHTS), folder)
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    encoder, decoder = load_encoder(VAE_WEIGHTS), load_decoder(VAE_WEIGHTS)
    made: Any = Kandinsky5T2VPipeline(
        transformer=Kandinsky5Transformer3DModel.from_pretrained(folder),
        vae=stock_vae(decoder.config, encoder, decoder),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=load_settings().scheduler_scale),
        **encoders,
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def texts() -> dict[str, Any]:
    encoder = MiniLMTextEncoder()
    given: dict[str, Any] = {}
    for prefix, words in (("", PROMPT), ("negative_", "")):
        text = encoder.encode([words])
        given |= {
            f"{prefix}prompt_embeds_qwen": text.tokens,
            f"{prefix}prompt_embeds_clip": text.pooled,
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
            f"{prefix}prompt": [words],
        }
    return given


@pytest.fixture(scope="module")
def uncached(pipe: Any, texts: dict[str, Any]) -> tuple[Tensor, float]:
    return timed(lambda: generate(pipe, texts, SMALL, STEPS))


def generate(
    pipe: Any, texts: dict[str, Any], size: tuple[int, int, int], steps: int, output: str = "latent"
) -> Tensor:
    height, width, frames = size
    return pipe(
        **texts, height=height, width=width, num_frames=frames, num_inference_steps=steps,
        guidance_scale=load_settings().guidance, generator=torch.Generator().manual_seed(0), output_type=output,
    ).frames  # fmt: skip


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    out = run()
    return out, time.perf_counter() - began


@torch.inference_mode()
def decibels(latent: Tensor, reference: Tensor) -> float:
    decoder = load_decoder(VAE_WEIGHTS)
    frames, expected = (to_frames(decoder(one[..., :16].permute(0, 4, 1, 2, 3))) for one in (latent, reference))
    return psnr(frames, expected)


def our_cache(speedup: float) -> MagCache:
    """By two steps skipped in a row, which lose less than three do at as many passes, and with extrapolation in full.
    Three lead further, and are extrapolated less far."""
    settings: dict[str, Any] = {"max_skips": 2, "extrapolate": EXTRAPOLATE}
    if speedup > MOST_BY_TWO:
        settings = {"max_skips": 3, "extrapolate": 0.7, "together": True}
    return MagCache.for_target(load_settings().mag_ratios, speedup=speedup, retention=0.1, **settings)


def test_the_pipeline_end_to_end(pipe, texts, capsys):
    """From noise to frames, the VAE too: stock, with each part of the drop-in alone, and with all of it, in turn."""
    settings = load_settings()
    sparse: dict[str, Any] = {"attention": "nabla", "thr": settings.thr, "sta": settings.sta}
    parts: dict[str, dict[str, Any] | None] = {
        "stock": None,
        "attention": sparse,
        "cache": {"attention": None, "cache": our_cache(speedup=2.0)},
        "vae": {"attention": None, "vae": "stream"},
        "all": {**sparse, "cache": our_cache(speedup=2.0), "vae": "stream"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    frames: dict[str, Tensor] = {}
    for number in range(WHOLE_ROUNDS):
        for name, options in parts.items():
            if number and name not in ("stock", "all"):
                continue
            with nullcontext() if options is None else accelerate(pipe, **options):
                frames[name], took = timed(lambda: generate(pipe, texts, WHOLE, WHOLE_STEPS, "pt"))
            seconds[name].append(took)
    stock = median(seconds["stock"])
    with capsys.disabled():
        print(f"\nend to end, {WHOLE_STEPS} steps of {WHOLE}, {torch.get_num_threads()} threads, {torch.__version__}:")
        for name, times in seconds.items():
            near = "" if name == "stock" else f", PSNR to stock {psnr(frames[name], frames['stock'], 1.0):.1f} dB"
            print(f"  {name}: {median(times):.1f} s, {stock / median(times):.2f}x{near}")
    assert stock / median(seconds["all"]) >= FLOOR_WHOLE


@pytest.mark.parametrize("speedup", [2.5, 2.8])
def test_the_cache_alone(pipe, texts, speedup, capsys):
    uncached, ours = [], []
    for _ in range(CACHE_ROUNDS):
        full, took = timed(lambda: generate(pipe, texts, SMALL, STEPS))
        uncached.append(took)
        with accelerate(pipe, attention=None, cache=our_cache(speedup=speedup)) as report:
            cached, took = timed(lambda: generate(pipe, texts, SMALL, STEPS))
        ours.append(took)
    found, gain = decibels(cached, full), median(uncached) / median(ours)
    with capsys.disabled():
        print(
            f"\ncache alone, {STEPS} steps of {SMALL}: {gain:.2f}x (floor {FLOOR_CACHE}), {found:.1f} dB "
            f"(floor {FLOOR_DB}), {report.caches[0].skipped} of {len(report.caches[0].passes)} passes skipped"
        )
    assert gain >= FLOOR_CACHE
    assert found >= FLOOR_DB


@contextmanager
def mag_cache_of_diffusers(pipe: Any, contexts: bool) -> Iterator[None]:
    """As its pipeline calls the model: one state for both branches. contexts: one for each, by turns."""
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    model, turn = pipe.transformer, 0

    def name_it(*_: Any) -> None:
        nonlocal turn
        turn += 1
        _set_cache_context(model, CacheContext("cond" if turn % 2 else "uncond"))

    ratios = [1.0, *load_settings().mag_ratios["cond"]]
    config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS, threshold=0.12, max_skip_steps=2)
    model.enable_cache(config)
    hook = model.register_forward_pre_hook(name_it) if contexts else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        model.disable_cache()


RIVALS = {
    "MagCache as the pipeline calls it": lambda pipe: mag_cache_of_diffusers(pipe, contexts=False),
    "MagCache with contexts": lambda pipe: mag_cache_of_diffusers(pipe, contexts=True),
}


@pytest.mark.parametrize("rival", RIVALS)
def test_psnr_at_the_same_number_of_computed_passes(pipe, texts, uncached, rival, capsys):
    full, _ = uncached
    ran: list[int] = []
    counter = pipe.transformer.visual_transformer_blocks[3].self_attention.register_forward_hook(
        lambda *_: ran.append(1)
    )
    try:
        with RIVALS[rival](pipe):
            theirs = generate(pipe, texts, SMALL, STEPS)
    finally:
        counter.remove()
    assert len(ran) < 2 * STEPS
    with accelerate(pipe, attention=None, cache=our_cache(speedup=2 * STEPS / len(ran))) as report:
        ours = generate(pipe, texts, SMALL, STEPS)
    computed = len(report.caches[0].passes) - report.caches[0].skipped
    found = decibels(ours, full), decibels(theirs, full)
    with capsys.disabled():
        print(f"\n{rival}: {found[1]:.1f} dB with {len(ran)} computed passes; ours {found[0]:.1f} dB with {computed}")
    assert computed <= len(ran)
    assert found[0] > found[1]
