"""Puts our attention into a pipeline or a transformer of diffusers, and takes it out again without a trace."""

from types import TracebackType
from typing import Any

from torch import Tensor

from k5kernels.attention import AttentionConfig
from k5kernels.integrations.diffusers.attention import Pass, VisualSelfAttention
from k5kernels.integrations.diffusers.report import Report
from k5kernels.token_layout import TokenLayout

SPARSE_PARAMS = 7  # place among the arguments of the model's forward
KANDINSKY_5 = "Kandinsky5Transformer3DModel"


class UnsupportedModelError(ValueError):
    """A model whose attention cannot be replaced; the message says why and which can."""


class Acceleration:
    """What `accelerate` did to a model, until `disable`.

    report: what the accelerated runs did. As a context manager it gives the report, and ends with the block.
    """

    def __init__(self, transformer: Any, pipeline: Any | None, shared: Pass) -> None:
        self.transformer, self.pipeline, self._shared = transformer, pipeline, shared
        self.report = shared.report
        self._steps = _Steps()
        self._replaced: list[tuple[Any, VisualSelfAttention]] = []
        for layer, block in enumerate(transformer.visual_transformer_blocks):
            ours = VisualSelfAttention(block.self_attention.processor, layer, shared)
            block.self_attention.set_processor(ours)
            self._replaced.append((block.self_attention, ours))
        # First of the hooks: the others see what the model will be given.
        self._hook = transformer.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True)
        if pipeline is not None and hasattr(pipeline, "get_sparse_params"):
            pipeline.get_sparse_params = _NoSparseParams(pipeline.__dict__.get("get_sparse_params"), pipeline, shared)

    def disable(self) -> None:
        """Put back what was there. What somebody else has put over ours since stays; ours under it then does nothing.

        Calling it again does nothing.
        """
        if not self._shared.active:
            return
        self._shared.active = False
        self._hook.remove()
        for attention, ours in self._replaced:
            if attention.processor is ours:
                attention.set_processor(_still_active(ours))
        if (pipeline := self.pipeline) is None:
            return
        own = pipeline.__dict__.get("get_sparse_params")
        if isinstance(own, _NoSparseParams) and own.shared is self._shared:
            if (former := _still_active(own)) is None:
                del pipeline.get_sparse_params
            else:
                pipeline.get_sparse_params = former

    def __enter__(self) -> Report:
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()

    def _before_pass(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Notes the shape of the clip and the step, and leaves the order of tokens to us."""
        names = ("hidden_states", "encoder_hidden_states", "timestep")
        given = dict(zip(names, args, strict=False)) | kwargs
        _, T, H, W, _ = given["hidden_states"].shape
        patch = transformer.patch_size
        self._shared.layout = TokenLayout(((T // patch[0], H // patch[1], W // patch[2]),))
        if self._shared.dense_steps or self._shared.densities:
            self._shared.step = self._steps.number(given["timestep"])
        if len(args) > SPARSE_PARAMS:
            return (*args[:SPARSE_PARAMS], None, *args[SPARSE_PARAMS + 1 :]), kwargs
        return args, {**kwargs, "sparse_params": None}


class _NoSparseParams:
    """In place of a pipeline's method, which would build a mask of gigabytes that we do not read.

    That method also refuses sizes that are no multiple of 128 pixels. original: what the pipeline itself, and not its
    class, had under that name.
    """

    def __init__(self, original: Any, pipeline: Any, shared: Pass) -> None:
        self.original, self.pipeline, self.shared = original, pipeline, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.active:
            return None
        if self.original is None:
            return type(self.pipeline).get_sparse_params(self.pipeline, *args, **kwargs)
        return self.original(*args, **kwargs)


def _still_active(ours: VisualSelfAttention | _NoSparseParams) -> Any:
    """What is under ours, and under what other accelerations that have ended left there."""
    under = ours.original
    while isinstance(under, type(ours)) and not under.shared.active:
        under = under.original
    return under


class _Steps:
    """Counts the steps of a run by its timesteps, which fall; one that rises begins the next run."""

    def __init__(self) -> None:
        self._time: float | None = None
        self._step = 0

    def number(self, timestep: Tensor) -> int:
        """Passes at one time are one step: the guided branches, in any number and order. Waits for the device."""
        time = float(timestep.flatten()[0])
        if self._time is None or time > self._time:
            self._step = 0
        elif time < self._time:
            self._step += 1
        self._time = time
        return self._step


def accelerate(
    target: Any,
    *,
    attention: str = "nabla",
    thr: float = 0.9,
    sta: tuple[int, int, int] | None = None,
    dense_steps: int = 0,
    densities: bool = False,
) -> Acceleration:
    """Run the visual self-attention of a Kandinsky 5 pipeline or transformer by one of our engines.

    target: a pipeline of diffusers, or its transformer, compiled or not; any size of video, batches, CPU and GPU.
    attention: an engine of `k5kernels.attention.ENGINES`, or "auto" for the dense one that fits. thr, sta: of "nabla",
    as in `nabla_attention`. dense_steps: the first steps of each run that are left as they are. densities: collect in
    the report how dense each layer's mask was, step by step; on a GPU the host then waits for each.

    The weights stay the model's, with its adapters; no class and no global state is changed. Raises
    UnsupportedModelError where the model is another, ValueError where a setting does not fit.
    """
    config = AttentionConfig(attention, thr, sta)
    if dense_steps < 0:
        raise ValueError(f"dense_steps: expected at least 0, got {dense_steps}")
    pipeline = target if hasattr(target, "components") else None
    transformer = getattr(target, "transformer", None) if pipeline is not None else target
    transformer = getattr(transformer, "_orig_mod", transformer)  # of torch.compile(transformer)
    if type(transformer).__name__ != KANDINSKY_5:
        raise UnsupportedModelError(
            f"target: expected a pipeline of Kandinsky 5 or its {KANDINSKY_5}, got {type(target).__name__} "
            f"with {type(transformer).__name__}: the order and the roles of its tokens are not known here"
        )
    return Acceleration(transformer, pipeline, Pass(config, dense_steps, densities))
