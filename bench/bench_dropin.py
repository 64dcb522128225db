"""The drop-in in diffusers' Kandinsky 5 pipeline with the nano weights, against stock and against other caches.

Every test prints its row as soon as it is known; end to end, each run of minutes has a line of its own.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel
from torch import Tensor

from bench.rival_caches import RIVALS, mag_cache_with_contexts
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

STEPS, SMALL, CACHE_ROUNDS = 50, (128, 192, 9), 5  # height, width, frames
WHOLE_STEPS, WHOLE, WHOLE_ROUNDS = 20, (256, 384, 17), 3
RABBIT = "A big grey rabbit stands in a green meadow."
MAN = "A man in a suit with a red bow tie talks while he sits in a moving car."
MOST_BY_TWO = 2.5  # passes for a computed one
# PSNR is of decoded frames to those of the uncached run.
FLOOR_WHOLE, FLOOR_CACHE, FLOOR_DB = 3.0, 2.0, 40.0

Say = Callable[[str], None]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a line at once, past pytest's capture."""

    def now(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)

    return now


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


@cache
def embedded(prompt: str) -> dict[str, Any]:
    encoder = MiniLMTextEncoder()
    given: dict[str, Any] = {}
    for prefix, words in (("", prompt), ("negative_", "")):
        text = encoder.encode([words])
        given |= {
            f"{prefix}prompt_embeds_qwen": text.tokens,
            f"{prefix}prompt_embeds_clip": text.pooled,
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, text.tokens.shape[1]]),
            f"{prefix}prompt": [words],
        }
    return given


def generate(
    pipe: Any,
    size: tuple[int, int, int] = SMALL,
    steps: int = STEPS,
    prompt: str = RABBIT,
    seed: int = 0,
    output: str = "latent",
) -> Tensor:
    height, width, frames = size
    return pipe(
        **embedded(prompt), height=height, width=width, num_frames=frames, num_inference_steps=steps,
        guidance_scale=load_settings().guidance, generator=torch.Generator().manual_seed(seed), output_type=output,
    ).frames  # fmt: skip


@pytest.fixture(scope="module")
def uncached(pipe: Any) -> Tensor:
    return generate(pipe)


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
    """By two steps skipped in a row where that reaches the target: three lose more at as many passes."""
    max_skips = 2 if speedup <= MOST_BY_TWO else 3
    return MagCache.for_target(
        load_settings().mag_ratios, speedup=speedup, max_skips=max_skips, retention=0.1, extrapolate=EXTRAPOLATE,
        together=True,
    )  # fmt: skip


def test_the_pipeline_end_to_end(pipe, say):
    """From noise to frames, the VAE too: stock and all of the drop-in, in turn; then each part of it alone, once."""
    settings = load_settings()
    sparse: dict[str, Any] = {"attention": "nabla", "thr": settings.thr, "sta": settings.sta}
    parts: dict[str, dict[str, Any] | None] = {
        "stock": None,
        "all": {**sparse, "cache": our_cache(speedup=2.0), "vae": "stream"},
        "attention": sparse,
        "cache": {"attention": None, "cache": our_cache(speedup=2.0)},
        "vae": {"attention": None, "vae": "stream"},
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    frames: dict[str, Tensor] = {}
    say(f"end to end, {WHOLE_STEPS} steps of {WHOLE}, {torch.get_num_threads()} threads, torch {torch.__version__}:")
    for name in [*["stock", "all"] * WHOLE_ROUNDS, "attention", "cache", "vae"]:
        options = parts[name]
        with nullcontext() if options is None else accelerate(pipe, **options):
            frames[name], took = timed(lambda: generate(pipe, WHOLE, WHOLE_STEPS, output="pt"))
        seconds[name].append(took)
        say(f"  {name}: {took:.1f} s, PSNR to stock {psnr(frames[name], frames['stock'], 1.0):.1f} dB")
    stock = median(seconds["stock"])
    gains = {name: stock / median(times) for name, times in seconds.items() if name != "stock"}
    say(f"  stock is {stock:.1f} s; times as fast: " + ", ".join(f"{name} {gain:.2f}" for name, gain in gains.items()))
    pairs = ", ".join(f"{one / other:.2f}" for one, other in zip(seconds["stock"], seconds["all"], strict=True))
    say(f"  all: {gains['all']:.2f}x (floor {FLOOR_WHOLE}), pair by pair {pairs}")
    assert gains["all"] >= FLOOR_WHOLE


@pytest.mark.parametrize("speedup", [2.5, 2.8])
def test_the_cache_alone(pipe, speedup, say):
    uncached, ours = [], []
    for _ in range(CACHE_ROUNDS):
        full, took = timed(lambda: generate(pipe))
        uncached.append(took)
        with accelerate(pipe, attention=None, cache=our_cache(speedup=speedup)) as report:
            cached, took = timed(lambda: generate(pipe))
        ours.append(took)
    found, gain = decibels(cached, full), median(uncached) / median(ours)
    say(
        f"cache alone, {STEPS} steps of {SMALL}: {gain:.2f}x (floor {FLOOR_CACHE}), {found:.1f} dB "
        f"(floor {FLOOR_DB}), {report.caches[0].skipped} of {len(report.caches[0].passes)} passes skipped"
    )
    assert gain >= FLOOR_CACHE
    assert found >= FLOOR_DB


@pytest.mark.parametrize("speedup", [2.5, 2.8])
@pytest.mark.parametrize(("prompt", "seed"), [(RABBIT, 1), (MAN, 0), (MAN, 1)])
def test_the_cache_on_prompts_and_seeds_it_was_not_set_by(pipe, prompt, seed, speedup, say):
    full = generate(pipe, prompt=prompt, seed=seed)
    with accelerate(pipe, attention=None, cache=our_cache(speedup=speedup)):
        found = decibels(generate(pipe, prompt=prompt, seed=seed), full)
    say(f"cache alone, passes / computed {speedup}, seed {seed}, {prompt!r}: {found:.1f} dB (floor {FLOOR_DB})")
    assert found >= FLOOR_DB


@contextmanager
def counted_passes(model: Any) -> Iterator[list[int]]:
    """One entry for each pass in which a block in the middle of the model ran."""
    ran: list[int] = []
    blocks = model.visual_transformer_blocks
    hook = blocks[len(blocks) // 2].self_attention.register_forward_hook(lambda *_: ran.append(1))
    try:
        yield ran
    finally:
        hook.remove()


# Those of cache-dit come last: it changes the class of the pipeline.
@pytest.mark.parametrize("rival", RIVALS)
def test_psnr_at_no_more_computed_passes(pipe, uncached, rival, say):
    """Ours as recommended for 2.5 passes a computed one, where all gaps between computed steps are alike."""
    if "cache-dit" in rival and find_spec("cache_dit") is None:
        say(f"{rival}: not measured, `pip install .[rivals]` first")
        pytest.skip("cache-dit, a rival and no part of an installation, is not there: pip install .[rivals]")
    with counted_passes(pipe.transformer) as ran, RIVALS[rival](pipe, STEPS):
        theirs = generate(pipe)
    assert len(ran) < 2 * STEPS
    with accelerate(pipe, attention=None, cache=our_cache(speedup=MOST_BY_TWO)) as report:
        ours = generate(pipe)
    computed = len(report.caches[0].passes) - report.caches[0].skipped
    found = decibels(ours, uncached), decibels(theirs, uncached)
    say(f"{rival}: {found[1]:.1f} dB with {len(ran)} computed passes; ours {found[0]:.1f} dB with {computed}")
    assert computed <= len(ran)
    assert found[0] > found[1]


FEW = 10  # steps, enough to see which blocks run how


def eager_blocks(model: Any) -> tuple[list[int], list[int]]:
    """Two lists that grow by one for each visual block that runs: in all, and not compiled. To be asked for before the
    blocks are compiled."""
    every: list[int] = []
    eager: list[int] = []

    def noted(*_: Any) -> None:
        every.append(1)
        if not torch.compiler.is_compiling():  # in compiled code a constant, true
            eager.append(1)

    for block in model.visual_transformer_blocks:
        block.self_attention.register_forward_hook(noted)
    return every, eager


@pytest.mark.parametrize("theirs", [True, False], ids=["diffusers' MagCache", "ours"])
def test_visual_blocks_that_run_eager_although_compiled(pipe, theirs, say):
    """Under `compile_repeated_blocks` with a cache on."""
    torch._dynamo.reset()
    other = type(pipe)(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    every, eager = eager_blocks(other.transformer)
    other.transformer.compile_repeated_blocks(backend="eager")
    ours: dict[str, Any] = {"attention": None, "cache": our_cache(speedup=1.5)}
    caching = mag_cache_with_contexts(other, FEW) if theirs else accelerate(other, **ours)
    # Noted blocks are not one code any more for the compiler: it compiles each, for each length of text.
    with torch._dynamo.config.patch(recompile_limit=100), caching:
        generate(other, steps=FEW)
    say(f"{'diffusers MagCache' if theirs else 'ours'}: {len(eager)} of {len(every)} visual blocks ran eager")
    assert 0 < len(every) < 2 * FEW * len(pipe.transformer.visual_transformer_blocks)
    assert len(eager) == (len(every) if theirs else 0)
