"""The numbers of a model and of a clip that the formulas read."""

from dataclasses import dataclass
from numbers import Integral

from k5kernels.planner.checks import one_of, positive_integer, positive_number, shown
from k5kernels.presets import MODEL_SIZES, CrossDiTConfig
from k5kernels.vae.config import SPATIAL_STRIDE, TEMPORAL_STRIDE, latent_frames

FRAMES_PER_SECOND = 24  # of the released models: 5 s are 121 frames (Table 5)
PATCH = 2  # latent pixels along a side of a token (patchify 1×2×2, §5.2)
TOKEN_PIXELS = (SPATIAL_STRIDE * PATCH) ** 2


@dataclass(frozen=True)
class ModelShape:
    """Size of a CrossDiT (Table 3): widths of the tokens, the time embedding, the MLP and a head; CrossDiT blocks.

    Raises ValueError that names the field where one is not a positive integer.
    """

    model_dim: int
    time_dim: int
    ff_dim: int
    blocks: int
    head_dim: int = 64

    def __post_init__(self) -> None:
        for field in ("model_dim", "time_dim", "ff_dim", "blocks", "head_dim"):
            positive_integer(field, getattr(self, field))

    @classmethod
    def of(cls, config: CrossDiTConfig) -> "ModelShape":
        """The shape of a model of that config."""
        return cls(config.model_dim, config.time_dim, config.ff_dim, config.visual_blocks, config.head_dim)

    @property
    def heads(self) -> int:
        """Heads of an attention."""
        return self.model_dim // self.head_dim

    @property
    def parameters(self) -> int:
        """P: parameters of the CrossDiT blocks."""
        return parameters(self.model_dim, self.time_dim, self.ff_dim, self.blocks)


def swapped_blocks(count: int, model: ModelShape) -> int:
    """The count. Raises ValueError where it is not an integer from 0 to two below the model's blocks: one runs, and
    one is on its way.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or not 0 <= count <= max(0, model.blocks - 2):
        most = max(0, model.blocks - 2)
        raise ValueError(f"swapped: expected an integer from 0 to {most} of {model.blocks} blocks, got {shown(count)}")
    return int(count)


def parameters(model_dim: int, time_dim: int, ff_dim: int, blocks: int) -> int:
    """P = L · (9·d_t·d + 8·d² + 2·d_f·d): parameters of the CrossDiT blocks (§7.3.2).

    Raises ValueError where an argument is not a positive integer.
    """
    d = positive_integer("model_dim", model_dim)
    modulation = 9 * positive_integer("time_dim", time_dim) * d
    mlp = 2 * positive_integer("ff_dim", ff_dim) * d
    return positive_integer("blocks", blocks) * (modulation + 8 * d**2 + mlp)


MODELS: dict[str, ModelShape] = {name: ModelShape.of(config) for name, config in MODEL_SIZES.items()}


def model_shape(name: str) -> ModelShape:
    """The shape of a released model; ValueError where there is none of that name."""
    return MODELS[one_of("preset", name, MODELS)]


@dataclass(frozen=True)
class ClipShape:
    """Size of a clip: height and width in pixels, multiples of 16; video frames, 1 (an image) + a multiple of 4."""

    height: int
    width: int
    frames: int

    def __post_init__(self) -> None:
        side = SPATIAL_STRIDE * PATCH
        for field in ("height", "width"):
            if positive_integer(field, getattr(self, field)) % side:
                raise ValueError(f"{field}: expected a multiple of {side} pixels, got {getattr(self, field)}")
        latent_frames(positive_integer("frames", self.frames))

    @property
    def latent_frames(self) -> int:
        """Frames of the latent: T."""
        return latent_frames(self.frames)

    @property
    def pixels(self) -> int:
        """Height · width · latent frames: the S of the step formula."""
        return self.height * self.width * self.latent_frames

    @property
    def tokens(self) -> int:
        """Visual tokens: the S of the memory formula."""
        return self.pixels // TOKEN_PIXELS


def frames_for(seconds: float) -> int:
    """Video frames of a clip of that length at 24 frames a second, rounded to 1 + a multiple of 4."""
    groups = positive_number("seconds", seconds) * FRAMES_PER_SECOND / TEMPORAL_STRIDE
    return 1 + TEMPORAL_STRIDE * round(groups)
