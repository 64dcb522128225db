"""Puts our attention, cache and VAE into a pipeline or a model of diffusers, and takes them out without a trace."""

import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from k5kernels.attention import AttentionConfig
from k5kernels.cache import Policy
from k5kernels.integrations.diffusers.attention import Pass, VisualSelfAttention
from k5kernels.integrations.diffusers.caching import TransformerCache, choose_policy
from k5kernels.integrations.diffusers.choice import configs_for, configs_for_clip
from k5kernels.integrations.diffusers.joint import JointAttention
from k5kernels.integrations.diffusers.models import Family, UnsupportedModelError, family_of, uncompiled
from k5kernels.integrations.diffusers.overlays import NoSparseParams, Overlay
from k5kernels.integrations.diffusers.report import Report
from k5kernels.integrations.diffusers.super_resolution import AnySize
from k5kernels.integrations.diffusers.vae import VAEModes, is_vae
from k5kernels.token_layout import TokenLayout
from k5kernels.vae.plan import Mode

SPARSE_PARAMS = 7  # place among the arguments of Kandinsky 5's forward
FRACTAL_ORDER = {"to_fractal": True}
TRANSFORMERS = ("transformer", "transformer_2")  # of Wan 2.2 the second is for the last steps


class Acceleration:
    """What `accelerate` did to a pipeline or a model, until `disable`.

    report: what the accelerated runs did. As a context manager it gives the report, and ends with the block.
    """

    def __init__(self, report: Report, parts: "Sequence[_Attention | TransformerCache | VAEModes | Overlay]") -> None:
        self.report, self._parts = report, list(parts)

    def disable(self) -> None:
        """Put back what was there. What somebody else has put over ours since stays; ours under it then does nothing.

        Calling it again does nothing.
        """
        while self._parts:
            self._parts.pop().remove()

    def __enter__(self) -> Report:
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


class _Attention:
    """Our processors in one transformer."""

    def __init__(self, transformer: Any, shared: Pass) -> None:
        self._shared = shared
        self._steps = _Steps()
        self._names = list(inspect.signature(type(transformer).forward).parameters)[1:]
        self._replaced: list[tuple[Any, VisualSelfAttention]] = []
        for layer, attention in enumerate(shared.family.attentions(transformer)):
            ours = (JointAttention if shared.family.joint else VisualSelfAttention)(attention.processor, layer, shared)
            attention.set_processor(ours)
            self._replaced.append((attention, ours))
        # First of the hooks: the others see what the model will be given.
        self._hook = transformer.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        self._shared.active = False
        self._hook.remove()
        for attention, ours in self._replaced:
            if attention.processor is ours:
                attention.set_processor(_still_active(ours))

    def _before_pass(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Notes the shape of the clip and the step, and tells Kandinsky 5 how to order its tokens: once for all blocks
        where their sides are multiples of 8."""
        shared = self._shared
        hidden_states = args[0] if args else kwargs["hidden_states"]
        layout = TokenLayout((shared.family.grid(transformer, hidden_states),))
        if shared.auto is not None and layout != shared.layout:
            latents, device = shared.family.latents(hidden_states), hidden_states.device
            shared.configs = configs_for_clip(shared.auto, latents, shared.family.pixels, device, transformer.dtype)
            shared.dense_layers.clear()
        shared.layout = layout
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if shared.family.joint:
            shared.text_lengths = given["encoder_attention_mask"].sum(dim=1, dtype=torch.int).tolist()
        if shared.dense_steps or shared.densities:
            shared.step = self._steps.number(given["timestep"])
        if not shared.family.orders_tokens:
            return args, kwargs
        sparse = any(config.sparse for config in shared.configs)
        order = FRACTAL_ORDER if sparse and layout.full_blocks else None
        if len(args) > SPARSE_PARAMS:
            return (*args[:SPARSE_PARAMS], order, *args[SPARSE_PARAMS + 1 :]), kwargs
        return args, {**kwargs, "sparse_params": order}


def _still_active(ours: VisualSelfAttention) -> Any:
    """What is under ours, and under what other accelerations that have ended left there."""
    under = ours.original
    while isinstance(under, VisualSelfAttention) and not under.shared.active:
        under = under.original
    return under


class _Steps:
    """Counts the steps of a run by its timesteps, which fall; one that rises begins the next run."""

    def __init__(self) -> None:
        self._time: float | None = None
        self._step = 0

    def number(self, timestep: Tensor) -> int:
        """Passes at one time are one step: the guided branches, in any number and order. Waits for the device."""
        time = float(timestep.max())
        if self._time is None or time > self._time:
            self._step = 0
        elif time < self._time:
            self._step += 1
        self._time = time
        return self._step


def accelerate(
    target: Any,
    *,
    attention: str | None = "nabla",
    thr: float | Sequence[float] | None = None,
    sta: tuple[int, int, int] | None = None,
    dense_steps: int = 0,
    densities: bool = False,
    cache: str | Policy | Sequence[Policy] | None = None,
    vae: Mode | None = None,
    vae_memory: int | None = None,
) -> Acceleration:
    """Run the visual self-attention of a pipeline or transformer of diffusers by our engines, cache its blocks, and
    encode and decode by our halves of its VAE.

    target: a pipeline of Kandinsky 5 or 6, Kandinsky 6's super-resolution, Wan 2.1 or 2.2 or HunyuanVideo, its
    transformer or VAE, compiled or not; any size of video that the model itself takes (Kandinsky 5 and the
    super-resolution: any at all), batches, CPU and GPU. For a VAE alone only `vae` and `vae_memory` count.

    attention: an engine of `k5kernels.attention.ENGINES`; "auto" for NABLA on long or large videos and dense attention
    on the others (§7.2), and in a layer whose mask is too dense to gain by it on this device; None to leave it alone.
    thr, sta: of sparse engines, as in `nabla_attention`, thr also as one value a layer; None for those the model was
    trained with, and 0.9 where it was not. dense_steps: the first steps of each run that are left as they are.
    densities: collect in the report how dense each layer's mask was, step by step; on a GPU the host then waits for
    each, as it does under "auto".

    cache: "magcache" for the ratios released for such a model, with residuals extrapolated; a name of
    `k5kernels.presets.RELEASED` for those of that model; or a policy, as `MagCache` or, to calibrate, `MagCalibration`
    (for a pipeline with two transformers, a list of two).

    vae: the mode of `HunyuanEncoder.encode` and `HunyuanDecoder.decode` in which the VAE of HunyuanVideo, which is
    Kandinsky's, encodes and decodes, on the weights it has and on the device it is moved to. None leaves it alone: then
    it takes frames in tiles that fade into each other. vae_memory: bytes for its activations, as `memory_budget` there.

    The weights stay the model's, with its adapters; no class and no global state is changed. Raises
    UnsupportedModelError where the model is another, ValueError where a setting does not fit, and
    EngineUnavailableError where the engine cannot run on the model's device.
    """
    if dense_steps < 0:
        raise ValueError(f"dense_steps: expected at least 0, got {dense_steps}")
    pipeline = target if hasattr(target, "components") else None
    autoencoder = _vae(target, pipeline, vae, cache)
    alone = autoencoder is target or (attention is None and cache is None and vae is not None)
    models = [] if alone else _transformers(target, pipeline)
    families = [family_of(model) if attention is not None else None for model in models]
    report = Report()
    configs = [
        None if family is None else configs_for(model, len(family.attentions(model)), str(attention), thr, sta)
        for model, family in zip(models, families, strict=True)
    ]
    policies = choose_policy(cache, models, pipeline, report) if cache is not None else [None] * len(models)
    parts: list[_Attention | TransformerCache | VAEModes | Overlay] = []
    done = Acceleration(report, parts)
    try:
        for model, family, config, policy in zip(models, families, configs, policies, strict=True):
            if family is not None and config is not None:
                done._parts.append(_put_attention(model, family, config, attention, dense_steps, densities, report))
            if family is not None and family.sparse_itself:
                done._parts.append(AnySize(model, "forward"))
            if policy is not None:
                done._parts.append(TransformerCache(model, policy, pipeline, report))
        if attention is not None and hasattr(pipeline, "get_sparse_params"):
            done._parts.append(NoSparseParams(pipeline, "get_sparse_params"))
        if vae is not None:
            done._parts.append(VAEModes(uncompiled(autoencoder), vae, vae_memory, report))
    except BaseException:
        done.disable()
        raise
    return done


def _put_attention(
    model: Any,
    family: Family,
    configs: list[AttentionConfig],
    engine: str | None,
    dense_steps: int,
    densities: bool,
    report: Report,
) -> _Attention:
    if family.joint and any(config.sparse and config.engine != "nabla" for config in configs):
        raise ValueError(f"attention={engine!r}: attention over text too is sparse by 'nabla' alone")
    if family.zero_shot and any(config.sparse for config in configs):
        report.notes.append(f"{family.zero_shot}: what sparse attention costs in quality is not known")
    shared = Pass(family, configs, dense_steps, densities, report, configs if engine == "auto" else None)
    return _Attention(model, shared)


def _vae(target: Any, pipeline: Any | None, mode: Mode | None, cache: object) -> Any | None:
    """That of a pipeline, or the target itself; None where it has none and none is asked for."""
    if pipeline is None and is_vae(uncompiled(target)):
        if mode is None or cache is not None:
            raise ValueError(f"target: a VAE alone takes vae and no cache, got vae={mode!r} and cache={cache!r}")
        return target
    found = getattr(pipeline, "vae", None)
    if mode is not None and found is None:
        raise ValueError(f"vae={mode!r}: expected a pipeline with a VAE or a VAE, got {type(target).__name__} without")
    return found


def _transformers(target: Any, pipeline: Any | None) -> list[Any]:
    if pipeline is None:
        return [uncompiled(target)]
    found = [getattr(pipeline, name, None) for name in TRANSFORMERS]
    models = [uncompiled(model) for model in found if isinstance(model, torch.nn.Module)]
    if not models:
        raise UnsupportedModelError(f"target: expected a pipeline with a transformer, got {type(pipeline).__name__}")
    return models
