"""What decides a stage of training, as a file that can be printed, edited and given back (§6.3, Table 4).

A file is one JSON object, or the same as TOML; what it leaves out has the default. `train.stages` has those by name.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from k5kernels.attention import DENSE, RELEASED_WINDOW, AttentionConfig
from k5kernels.planner.checks import one_of, read_text, shown
from k5kernels.vae.config import SPATIAL_STRIDE, latent_frames
from model.presets import PRESETS
from train.crossdit_stage import FlowMatching
from train.schedule import Schedule

TASKS = ("t2i", "t2v", "i2v", "editing")
KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
SIDE = 2 * SPATIAL_STRIDE  # pixels of a token


@dataclass(frozen=True)
class Settings:
    """A stage of training.

    name: of the stage. after: the stage whose weights it starts from, for whoever reads it. preset: sizes of the model.
    tasks: shares of the samples trained text to image, text to video, image to video and editing, which sum to 1;
    t2i is the share of steps on images alone. frames: of a clip at most, 1 + a multiple of 4; None: all of a sample.
    resolutions: "height x width" in pixels -> weight; None: whatever the data have. batch: samples of a step on clips;
    image_batch: on images, None: as many. nabla_thr: of NABLA attention, None for full attention; nabla_window: with
    the released window. The other names are those of FlowMatching, Schedule and CrossDiT.

    Raises ValueError that names the key, what was expected and what came.
    """

    steps: int
    name: str = "custom"
    after: str | None = None
    preset: str = "nano"
    tasks: dict[str, float] = field(default_factory=lambda: {"t2v": 0.5, "i2v": 0.5})
    frames: int | None = None
    resolutions: dict[str, float] | None = None
    batch: int = 1
    image_batch: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay_steps: int = 0
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.9999
    unconditional: float = 0.1
    scheduler_scale: float = 1.0
    nabla_thr: float | None = None
    nabla_window: bool = True
    checkpointing: bool = True
    offload: bool = False
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("preset", self.preset, PRESETS)
        _check_tasks(self.tasks)
        for size, weight in (self.resolutions or {}).items():
            resolution(size)
            if not 0 < weight < math.inf:
                raise ValueError(f"resolutions.{size}: expected a weight above 0, got {shown(weight)}")
        if self.resolutions == {}:
            raise ValueError("resolutions: expected at least one size, or null for those of the data, got {}")
        if self.frames is not None:
            latent_frames(self.frames) if self.frames > 0 else _refuse("frames", "at least 1", self.frames)
        if self.nabla_thr is not None and not 0 <= self.nabla_thr <= 1:
            _refuse("nabla_thr", "a share in [0, 1]", self.nabla_thr)
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            _refuse("max_grad_norm", "a number above 0, or null", self.max_grad_norm)
        if not 0 < self.scheduler_scale < math.inf:
            _refuse("scheduler_scale", "a positive number", self.scheduler_scale)
        self.training  # noqa: B018  # each checks its part
        self.schedule  # noqa: B018

    @property
    def training(self) -> FlowMatching:
        """The stage's part of the settings."""
        clips = self.tasks.get("t2v", 0) + self.tasks.get("i2v", 0)
        return FlowMatching(
            batch=self.batch,
            latent_frames=None if self.frames is None else latent_frames(self.frames),
            image_share=1.0 if not clips else self.tasks.get("t2i", 0.0),
            image_batch=self.image_batch,
            resolutions=None if self.resolutions is None else tuple(_latent_sizes(self.resolutions)),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            ema_decay=self.ema_decay,
            unconditional=self.unconditional,
            image_to_video=self.tasks.get("i2v", 0) / clips if clips else 0.0,
            scheduler_scale=self.scheduler_scale,
            attention=self.attention,
            bf16=self.bf16,
        )

    @property
    def attention(self) -> AttentionConfig:
        """Of the visual tokens."""
        if self.nabla_thr is None:
            return DENSE
        return AttentionConfig("nabla", self.nabla_thr, RELEASED_WINDOW if self.nabla_window else None)

    @property
    def schedule(self) -> Schedule:
        """The loop's part of the settings."""
        return Schedule(self.steps, self.warmup_steps, self.decay_steps, self.max_grad_norm, self.seed)

    def check_trainable(self) -> None:
        """Raises ValueError where there is no data of a task."""
        if self.tasks.get("editing"):
            raise ValueError(
                "tasks.editing: expected 0, got "
                f"{self.tasks['editing']}: latent shards hold no source image beside a target, which editing trains on"
            )

    def as_json(self) -> str:
        """The settings as the file that `read_settings` takes."""
        return json.dumps(asdict(self), indent=2)


def resolution(size: str) -> tuple[int, int]:
    """(height, width) in pixels of "512x768". Raises ValueError where it is no such text."""
    height, _, width = size.partition("x")
    if not (height.isascii() and height.isdigit() and width.isascii() and width.isdigit()):
        raise ValueError(f'resolutions: expected "height x width" as in "512x768", got {shown(size)}')
    sides = int(height), int(width)
    if any(side % SIDE or not side for side in sides):
        raise ValueError(f"resolutions: expected multiples of {SIDE} pixels, got {shown(size)}")
    return sides


def make_settings(values: Mapping[str, Any], source: str = "") -> Settings:
    """The settings of these values, keys and kinds checked. source: of the values, for the error message.

    Raises ValueError, one line that names the source, the key, what was expected and what came.
    """
    try:
        return Settings(**_checked(values))
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from None


def read_values(path: Path) -> dict[str, Any]:
    """What a settings file says, unchecked. Raises OSError or ValueError, which name the file, where it says nothing
    that can be read.
    """
    text = read_text(path, "settings of a stage")
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # both decoders' errors are ValueErrors
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise ValueError(f"{path}: expected settings of a stage as {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of settings, got {shown(values)}")
    return values


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(Settings)
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(f"{shown(unknown[0])}: no such key; expected some of {', '.join(hints)}")
    for key in fields(Settings):
        if key.default is MISSING and key.default_factory is MISSING and key.name not in values:
            raise ValueError(f"{key.name}: expected {KINDS[hints[key.name]]}, got none")
    return {name: _of_kind(name, value, hints[name]) for name, value in values.items()}


def _of_kind(name: str, value: Any, hint: Any) -> Any:
    """The value, an integer as a float where a number is asked for. Raises ValueError where it is of another kind."""
    if get_origin(hint) is UnionType:
        return None if value is None else _of_kind(name, value, get_args(hint)[0])
    if get_origin(hint) is dict:
        if isinstance(value, dict):
            return {key: _of_kind(f"{name}.{key}", inner, float) for key, inner in value.items()}
        hint = dict
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{name}: expected {KINDS[hint]}, got {shown(value)}")


def _check_tasks(tasks: Mapping[str, float]) -> None:
    for name, share in tasks.items():
        one_of("tasks", name, TASKS)
        if not 0 <= share <= 1:
            raise ValueError(f"tasks.{name}: expected a share in [0, 1], got {share}")
    if not math.isclose(sum(tasks.values()), 1, abs_tol=1e-6):
        raise ValueError(f"tasks: expected shares that sum to 1, got {sum(tasks.values()):g}")


def _latent_sizes(resolutions: Mapping[str, float]) -> list[tuple[tuple[int, int], float]]:
    sizes = ((resolution(size), weight) for size, weight in resolutions.items())
    return [((height // SPATIAL_STRIDE, width // SPATIAL_STRIDE), weight) for (height, width), weight in sizes]


def _refuse(name: str, expected: str, value: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
