"""Memory that users of public trainers and pipelines reported, with the settings they named, and the planner's answer.

Nothing of the planner was fitted to these.
"""

from dataclasses import dataclass

from k5kernels.planner import MODELS, ClipShape
from k5kernels.planner.inference import Generation, generation_memory
from k5kernels.planner.lora import Adapter, lora_memory

GB = 1e9
LITE = MODELS["video_lite"]


@dataclass(frozen=True)
class PublicReport:
    """what: was run. source: where it is reported. reported and predicted: bytes."""

    what: str
    source: str
    reported: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative; positive where the prediction is too large."""
        return self.predicted / self.reported - 1


def _adapter(model: str, adapter: Adapter, clip: ClipShape, clips: int = 1) -> float:
    return lora_memory(MODELS[model], adapter, clips * clip.tokens).total_bytes


# The quickstart says "~13 GB" of Lite without settings. Its author's example of the day before has these; the settings
# on the page itself are the second.
_SIMPLETUNER = "SimpleTuner, documentation/quickstart/KANDINSKY5_VIDEO.md (2025-11-23)"
_EXAMPLE = Adapter(rank=16, base_dtype="int8", optimizer_dtype="bfloat16")
_PRO_ADAPTER = Adapter(rank=32, layers="all", dtype="float32", base_dtype="float8", swapped=20, optimizer_dtype="int8")

PUBLIC_REPORTS = (
    PublicReport(
        "Lite, LoRA rank 16, int8 base, 2 clips of 480×480×45",
        _SIMPLETUNER,
        13 * GB,
        _adapter("video_lite", _EXAMPLE, ClipShape(480, 480, 45), clips=2),
    ),
    PublicReport(
        "Lite, LoRA rank 16, bfloat16 base, 1 clip of 512×512×61",
        _SIMPLETUNER,
        13 * GB,
        _adapter("video_lite", Adapter(rank=16, optimizer_dtype="bfloat16"), ClipShape(512, 512, 61)),
    ),
    PublicReport(
        "Pro, LoRA rank 32, float8 base, 20 blocks swapped, 1 clip of 256×256×73",
        "kandinskylab/kandinsky-5, issue 94: musubi-tuner, just fits in 24 GB",
        24 * GB,
        _adapter("video_pro", _PRO_ADAPTER, ClipShape(256, 256, 73)),
    ),
    PublicReport(
        "Lite, generation of 512×768×121, NF4 text encoder, offload",
        "kandinskylab/kandinsky-5, README (2025-10-19): should work on GPUs with 12 GB",
        12 * GB,
        generation_memory(
            Generation(LITE, ClipShape(512, 768, 121), text_encoder_dtype="nf4"), card_bytes=12 * 2**30
        ).total_bytes,
    ),
)
