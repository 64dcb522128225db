"""Other caches around the blocks of diffusers' Kandinsky 5 transformer, to compare ours with.

Each is a context manager of a pipeline: put in for a run of so many steps, and taken out again. Thresholds are those
with which it computes about as many passes of the nano model as the others; what else it has is as its authors set it,
or as ours where it has the same.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from diffusers import MagCacheConfig
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor

from model.nano import load_settings

Rival = Callable[[Any, int], AbstractContextManager[None]]

MAX_SKIPS, RETENTION = 2, 0.1  # as ours
SEA_THRESHOLD, DB_THRESHOLD = 0.25, 0.12
TRAIN_TIMES = 1000  # of the scheduler: a time is so many times the share of noise


@contextmanager
def _told_its_passes(pipe: Any, steps: int) -> Iterator[None]:
    """The name of each pass and where it stands in the run, which Kandinsky 5's pipeline does not tell: conditional
    and unconditional by turns."""
    passes = 0

    def tell(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal passes
        name, step = ("uncond" if passes % 2 else "cond"), passes // 2
        passes += 1
        time = float(kwargs["timestep"].max())
        _set_cache_context(
            model,
            CacheContext(name, step_index=step, num_inference_steps=steps, timestep=time, sigma=time / TRAIN_TIMES),
        )

    hook = pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()
        _set_cache_context(pipe.transformer, None)


@contextmanager
def _enabled(model: Any, config: Any) -> Iterator[None]:
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()


def _mag_config(steps: int) -> MagCacheConfig:
    ratios = [1.0, *load_settings().mag_ratios["cond"]]
    return MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps, threshold=0.12, max_skip_steps=MAX_SKIPS)


@contextmanager
def mag_cache(pipe: Any, steps: int) -> Iterator[None]:
    """diffusers' MagCache as its pipeline calls the model: one state for both branches."""
    with _enabled(pipe.transformer, _mag_config(steps)):
        yield


@contextmanager
def mag_cache_with_contexts(pipe: Any, steps: int) -> Iterator[None]:
    """The same with a state for each branch."""
    with _enabled(pipe.transformer, _mag_config(steps)), _told_its_passes(pipe, steps):
        yield


@contextmanager
def sea_cache(pipe: Any, steps: int) -> Iterator[None]:
    """diffusers' SeaCache, which extrapolates residuals too. Kandinsky 5's latents are shown to it as it wants them."""
    from diffusers import SeaCacheConfig

    channels = pipe.transformer.config.out_visual_dim

    def latents(model: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
        return list(kwargs["hidden_states"][..., :channels].movedim(-1, 1))

    config = SeaCacheConfig(
        threshold=SEA_THRESHOLD,
        retention_steps=round(RETENTION * steps),
        max_consecutive_cached=MAX_SKIPS,
        raw_vision_callback=latents,
    )
    with _enabled(pipe.transformer, config), _told_its_passes(pipe, steps):
        yield


def db_cache(taylor: bool) -> Rival:
    """cache-dit's DBCache; taylor: with its extrapolation by TaylorSeer. It changes the class of the pipeline."""

    @contextmanager
    def rival(pipe: Any, steps: int) -> Iterator[None]:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read when it is imported
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=DB_THRESHOLD,
            max_warmup_steps=round(RETENTION * steps),
            max_continuous_cached_steps=MAX_SKIPS,
            num_inference_steps=steps,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return rival


RIVALS: dict[str, Rival] = {
    "diffusers' MagCache as its pipeline calls it": mag_cache,
    "diffusers' MagCache with contexts": mag_cache_with_contexts,
    "diffusers' SeaCache": sea_cache,
    "cache-dit's DBCache": db_cache(taylor=False),
    "cache-dit's DBCache with TaylorSeer": db_cache(taylor=True),
}
