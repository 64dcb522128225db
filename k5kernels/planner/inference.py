"""Time and memory of a generation on one GPU, fitted to the report's Table 5.

    seconds = passes · 2 · L · (6·d² + 2·d_f·d) · S / linear rate      what multiplies every visual token
            + passes · 4 · L · S² · d · density / attention rate        q·kᵀ and p·v of the blocks that are read
            + height · width · frames / decoding rate
            + bytes of all weights / offload rate                       0 without offload
            + passes · bytes of swapped blocks / host link, where that takes longer than the passes themselves

passes: network evaluations that run the blocks, NFE (two a step with classifier-free guidance) less those that MagCache
skips. With offload one part is on the GPU at a time, and memory is the largest of

    text encoder  ·  2 · P · (1 − n/L) + bytes a token and channel · S · d + base  ·  VAE + what a tile takes

n: blocks that wait in host memory. Without offload it is the weights of all parts and the largest of what they compute
with. `decoding.py` has the tiles, which depend on the card. The four rates and the three memory figures are the only
ones fitted, by least squares on relative errors; Table 5 was measured on an H100 with offload.
The densities of its NABLA rows are expected ones (`density.py`). On another profile the computation takes longer or
shorter as its training step does (`HardwareProfile.speed`), and offload as its host link.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

import numpy as np

from k5kernels.planner import text_encoder
from k5kernels.planner.checks import one_of, positive_integer, positive_number, shown, switch
from k5kernels.planner.decoding import IMAGE_VAE_BYTES, VAE_BYTES, tile_values, working_bytes
from k5kernels.planner.density import nabla_density
from k5kernels.planner.least_squares import relative_fit
from k5kernels.planner.profile import H100, HardwareProfile
from k5kernels.planner.quantization import WEIGHT_BYTES
from k5kernels.planner.shapes import MODELS, ClipShape, ModelShape, swapped_blocks

# What MagCache skips of 50 steps with the released settings and ratios (§7.2): 26 for most models, 25 and 27 for two.
MAGCACHE_SKIPPED = 26 / 50


@dataclass(frozen=True)
class Generation:
    """What is generated: one clip by one model.

    nfe: network evaluations. nabla_thr: None for full attention. skipped: share of the evaluations that MagCache
    skips, below 1. offload: parts of the pipeline wait in host memory. text_encoder_dtype: of its linear layers, one of
    `quantization.WEIGHT_BYTES`. swapped: blocks of the CrossDiT that wait in host memory, each fetched in every pass.
    Raises ValueError that names the field.
    """

    model: ModelShape
    clip: ClipShape
    nfe: int = 100
    nabla_thr: float | None = None
    skipped: float = 0.0
    offload: bool = True
    text_encoder_dtype: str = "bfloat16"
    swapped: int = 0

    def __post_init__(self) -> None:
        positive_integer("nfe", self.nfe)
        switch("offload", self.offload)
        one_of("text_encoder_dtype", self.text_encoder_dtype, WEIGHT_BYTES)
        swapped_blocks(self.swapped, self.model)
        nabla_density(self.nabla_thr)
        if not isinstance(self.skipped, (int, float)) or not 0 <= self.skipped < 1:
            raise ValueError(f"skipped: expected a share from 0 to below 1, got {shown(self.skipped)}")

    @property
    def passes(self) -> float:
        """Network evaluations that run the blocks."""
        return self.nfe * (1 - self.skipped)

    @property
    def text_bytes(self) -> float:
        """Of the text encoder's weights."""
        return text_encoder.stored_bytes(self.text_encoder_dtype)

    @property
    def swapped_bytes(self) -> float:
        """Of the blocks that wait in host memory."""
        return self.weights_bytes * self.swapped / self.model.blocks

    @property
    def vae_bytes(self) -> float:
        """Of the VAE's weights."""
        return VAE_BYTES if self.clip.frames > 1 else IMAGE_VAE_BYTES

    @property
    def weights_bytes(self) -> float:
        """Of the CrossDiT in bfloat16."""
        return 2.0 * self.model.parameters

    @property
    def work(self) -> tuple[float, float, float, float]:
        """Flops of what multiplies tokens, flops of attention, pixels decoded, bytes moved from the host."""
        m, S, passes = self.model, self.clip.tokens, self.passes
        d, L = m.model_dim, m.blocks
        linear = passes * 2 * L * (6 * d**2 + 2 * m.ff_dim * d) * S
        attention = passes * 4 * L * S**2 * d * nabla_density(self.nabla_thr)
        pixels = self.clip.height * self.clip.width * self.clip.frames
        return linear, attention, float(pixels), (self.text_bytes + self.weights_bytes) * self.offload


@dataclass(frozen=True)
class InferenceRates:
    """What the model of inference knows of a GPU and of the implementation; see the module."""

    linear_flops_per_s: float
    attention_flops_per_s: float
    decode_pixels_per_s: float
    offload_bytes_per_s: float
    activation_bytes: float
    base_bytes: float
    decode_value_bytes: float


@dataclass(frozen=True)
class GenerationTime:
    """Terms of a generation, in seconds."""

    linear_s: float = field(metadata={"formula": "passes · 2·L·(6·d² + 2·d_f·d)·S / linear rate"})
    attention_s: float = field(metadata={"formula": "passes · 4·L·S²·d·density / attention rate"})
    decode_s: float = field(metadata={"formula": "pixels / decoding rate"})
    offload_s: float = field(metadata={"formula": "bytes of all weights / offload rate"})
    swap_s: float = field(metadata={"formula": "passes · bytes of swapped blocks / host link, beyond the passes"})

    @property
    def total_s(self) -> float:
        """The generation."""
        return self.linear_s + self.attention_s + self.decode_s + self.offload_s + self.swap_s


@dataclass(frozen=True)
class GenerationMemory:
    """What each part needs while it runs, in bytes of the GPU, its weights included."""

    text_bytes: float = field(metadata={"formula": "8.29e9 weights, in 2 bytes or quantized"})
    blocks_bytes: float = field(metadata={"formula": "2·P·(1 − n/L) + activation · S·d + base"})
    decode_bytes: float = field(metadata={"formula": "VAE + what a tile of a video takes"})
    resident_bytes: float = field(metadata={"formula": "weights of the parts that wait, without offload"})

    @property
    def total_bytes(self) -> float:
        """The memory of the GPU."""
        return max(self.text_bytes, self.blocks_bytes, self.decode_bytes) + self.resident_bytes


def generation_time(
    generation: Generation, rates: InferenceRates | None = None, profile: HardwareProfile = H100
) -> GenerationTime:
    """Terms of the time; rates: those fitted to the whole of Table 5 where None."""
    rates = rates or table5_rates()
    speeds = (
        rates.linear_flops_per_s * profile.speed,
        rates.attention_flops_per_s * profile.speed,
        rates.decode_pixels_per_s * profile.speed,
        rates.offload_bytes_per_s * profile.host_bytes_per_s / H100.host_bytes_per_s,
    )
    linear, attention, decode, offload = (a / speed for a, speed in zip(generation.work, speeds, strict=True))
    fetching = generation.passes * generation.swapped_bytes / profile.host_bytes_per_s
    return GenerationTime(linear, attention, decode, offload, swap_s=max(0.0, fetching - linear - attention))


def generation_memory(
    generation: Generation, rates: InferenceRates | None = None, card_bytes: float = H100.memory_bytes
) -> GenerationMemory:
    """What each part needs.

    rates: those fitted to the whole of Table 5 where None. card_bytes: memory of the GPU, which decides the tiles that
    a video is decoded in.
    """
    positive_number("card_bytes", card_bytes)
    rates = rates or table5_rates()
    text, vae = generation.text_bytes, generation.vae_bytes
    blocks = generation.weights_bytes - generation.swapped_bytes
    waiting = 0.0 if generation.offload else text + blocks
    activations = rates.activation_bytes * (generation.clip.tokens * generation.model.model_dim)
    tile = working_bytes(generation.clip, card_bytes - waiting - vae, rates.decode_value_bytes)
    parts = {
        "text_bytes": text,
        "blocks_bytes": blocks + activations + rates.base_bytes,
        "decode_bytes": vae + tile if tile else 0.0,
    }
    everything = waiting + vae + max(activations + rates.base_bytes, tile)
    return GenerationMemory(**parts, resident_bytes=0.0 if generation.offload else everything - max(parts.values()))


@dataclass(frozen=True)
class MeasuredGeneration:
    """A row of Table 5."""

    model: str
    variant: str
    generation: Generation
    seconds: float
    memory_bytes: float


@cache
def table5() -> tuple[MeasuredGeneration, ...]:
    """Table 5: one H100, offload on. Its memory is read as decimal gigabytes."""
    text = files("k5kernels.planner").joinpath("table5.csv").read_text()
    return tuple(_measured(row) for row in csv.DictReader(text.splitlines()))


def _measured(row: dict[str, str]) -> MeasuredGeneration:
    clip = ClipShape(int(row["height"]), int(row["width"]), int(row["frames"]))
    thr = float(row["nabla_thr"]) if row["nabla_thr"] else None
    generation = Generation(MODELS[row["model"]], clip, int(row["nfe"]), thr)
    return MeasuredGeneration(
        row["model"], row["variant"], generation, float(row["seconds"]), 1e9 * float(row["memory_gb"])
    )


@cache
def table5_rates() -> InferenceRates:
    """Fitted to all rows of Table 5."""
    return fit(table5())


def fit(rows: tuple[MeasuredGeneration, ...]) -> InferenceRates:
    """The rates by which the rows are predicted best; an infinite rate where a term does not show in them."""
    work = np.array([row.generation.work for row in rows])
    times = relative_fit(work, np.array([row.seconds for row in rows]))
    with np.errstate(divide="ignore"):
        linear, attention, decode, offload = (1 / times).tolist()
    return InferenceRates(linear, attention, decode, offload, *_fit_memory(rows))


def _fit_memory(rows: tuple[MeasuredGeneration, ...]) -> tuple[float, float, float]:
    """(bytes a token and channel, base, bytes of a value of decoding).

    The blocks decide the peak where their weights outweigh the text encoder, decoding where they do not.
    """
    heavy = [row for row in rows if row.generation.weights_bytes > text_encoder.STORED_BYTES]
    light = [row for row in rows if row not in heavy and row.generation.clip.frames > 1]
    values = np.array([[row.generation.clip.tokens * row.generation.model.model_dim, 1.0] for row in heavy])
    beyond = np.array([row.memory_bytes - row.generation.weights_bytes for row in heavy])
    activation, base = relative_fit(values, beyond).tolist()
    free = H100.memory_bytes - VAE_BYTES
    decode = np.mean([(row.memory_bytes - VAE_BYTES) / tile_values(row.generation.clip, free) for row in light])
    return activation, base, float(decode)


@dataclass(frozen=True)
class HeldOut:
    """A row of Table 5 and what a fit to all other rows says of it."""

    row: MeasuredGeneration
    seconds: float
    memory_bytes: float

    @property
    def time_error(self) -> float:
        """Relative; positive where the prediction is too long."""
        return self.seconds / self.row.seconds - 1

    @property
    def memory_error(self) -> float:
        """Relative; positive where the prediction is too large."""
        return self.memory_bytes / self.row.memory_bytes - 1


def leave_one_out() -> list[HeldOut]:
    """Every row of Table 5 predicted from the others."""
    found = []
    for row in table5():
        rates = fit(tuple(other for other in table5() if other is not row))
        time, memory = generation_time(row.generation, rates), generation_memory(row.generation, rates)
        found.append(HeldOut(row, time.total_s, memory.total_bytes))
    return found


def mean_errors(held_out: list[HeldOut]) -> tuple[float, float]:
    """Mean relative error, without sign, of (time, memory)."""
    return (
        float(np.mean([abs(each.time_error) for each in held_out])),
        float(np.mean([abs(each.memory_error) for each in held_out])),
    )
