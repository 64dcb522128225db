"""A cache around the blocks of a transformer of diffusers, told by its pipeline how many steps a run has."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from k5kernels.cache import MagCache, Policy, apply
from k5kernels.integrations.diffusers.models import FAMILIES, uncompiled
from k5kernels.integrations.diffusers.overlays import NoOtherCache, NotedContext, Overlay
from k5kernels.integrations.diffusers.report import Report
from k5kernels.presets import RELEASED

EXTRAPOLATE = 1.0  # what measures best on the nano model with two steps skipped in a row: bench/bench_dropin.py


class TransformerCache:
    """A policy at work on one transformer, until `remove`."""

    def __init__(self, model: Any, policy: Policy, pipeline: Any | None, report: Report) -> None:
        if getattr(model, "is_cache_enabled", False):
            raise ValueError("cache: a cache of diffusers is on; end it first with disable_cache()")
        family = FAMILIES.get(type(model).__name__)
        self._overlays: list[Overlay] = []
        context = NotedContext(model, "cache_context") if hasattr(model, "cache_context") else None
        if context is not None:
            self._overlays = [context, NoOtherCache(model, "enable_cache")]
        try:
            self._cached = apply(
                model,
                policy,
                blocks=family.blocks if family is not None else (),
                steps=_steps_of(pipeline, model),
                kind=lambda: _Identity(_times_of(pipeline)),
                name=lambda: context.current if context is not None else None,
            )
        except BaseException:
            self._remove_overlays()
            raise
        report.caches.append(self._cached.report)

    def remove(self) -> None:
        """The model as it was."""
        self._cached.remove()
        self._remove_overlays()

    def _remove_overlays(self) -> None:
        while self._overlays:
            self._overlays.pop().remove()


class _Identity:
    """Equal to another of the same object: the times of one run, which a scheduler makes anew for the next."""

    def __init__(self, held: object) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _times_of(pipeline: Any | None) -> Tensor | None:
    return getattr(getattr(pipeline, "scheduler", None), "timesteps", None)


def _steps_of(pipeline: Any | None, model: Any) -> Callable[[Tensor], int | None]:
    def steps(first: Tensor) -> int | None:
        """Of a run of this model that begins at this time: those that its scheduler still has for it, as the model can
        tell them apart."""
        times = _times_of(pipeline)
        if times is None:
            return None
        own = times[times >= _last_time_of(pipeline, model)].cpu().to(first.dtype).unique()
        return int((own <= first.max().cpu()).sum()) or None

    return steps


def _last_time_of(pipeline: Any, model: Any) -> float:
    """Wan 2.2 goes on with its second transformer from a boundary on."""
    boundary = getattr(pipeline.config, "boundary_ratio", None)
    if boundary is None or uncompiled(pipeline.transformer) is not model:
        return float("-inf")
    return boundary * pipeline.scheduler.config.num_train_timesteps


def choose_policy(
    cache: str | Policy | Sequence[Policy], models: Sequence[Any], pipeline: Any | None, report: Report
) -> list[Policy]:
    """One for each model. Raises ValueError where there is none."""
    if isinstance(cache, Sequence) and not isinstance(cache, str):
        policies = list(cache)
    elif isinstance(cache, str):
        policies = [_released(_name_for(cache, model, pipeline), report) for model in models]
    else:
        policies = [cache]
    if len(policies) != len(models):
        raise ValueError(f"cache: expected a policy for each of {len(models)} transformers, got {len(policies)}")
    return policies


def _released(name: str, report: Report) -> MagCache:
    settings = RELEASED[name]
    assert settings.mag_ratios is not None
    report.notes.append(f"the cache goes by the ratios of {name}")
    return MagCache.from_released(settings.mag_ratios, settings.num_steps, extrapolate=EXTRAPOLATE)


def _name_for(cache: str, model: Any, pipeline: Any | None) -> str:
    calibrated = [name for name, settings in RELEASED.items() if settings.mag_ratios is not None]
    if cache in calibrated:
        return cache
    if cache != "magcache":
        raise ValueError(f"cache: expected 'magcache', a policy or one of {', '.join(calibrated)}, got {cache!r}")
    sizes = ("model_dim", "visual_cond", "in_text_dim")
    wanted = tuple(getattr(model.config, size, None) for size in sizes)
    sparse = getattr(model.config, "attention_type", None) == "nabla"
    fitting = [
        name
        for name in calibrated
        if tuple(getattr(RELEASED[name].config, size) for size in sizes) == wanted
        and (pipeline is None or any(task in type(pipeline).__name__.lower() for task in name.split("_")))
    ]
    fitting.sort(key=lambda name: (RELEASED[name].attention.sparse != sparse, "sft" not in name))
    if not fitting:
        raise ValueError(
            f"cache: no ratios were released for this {type(model).__name__}; measure them in one run with "
            "cache=MagCalibration(), or name a model whose ratios to take: " + ", ".join(calibrated)
        )
    return fitting[0]
