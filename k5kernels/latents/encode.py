"""A video or picture to samples: its clips, encoded by the VAE (§6.1, §7.1)."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from k5kernels.latents.encoders import Encoder, check, dtype_of, fingerprint, latent, most_together
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample
from k5kernels.latents.sources import Source, content_hash
from k5kernels.latents.text import CaptionEncoder
from k5kernels.latents.video import AS_MODELS, Bucket, Clip, Reading, VideoError, buckets_of, read_clips, to_model
from k5kernels.profiling import stage
from k5kernels.vae import latent_frames
from k5kernels.vae.plan import MODES, Mode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Unencoded:
    """A clip of a source before it is encoded. sha256: of the source's content."""

    source: Source
    sha256: str
    clip: Clip
    caption: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its frames."""
        return self.clip.frames.shape[1], self.clip.frames.shape[2]


@dataclass(frozen=True)
class Encoding:
    """How sources become samples.

    resolution: a class of `k5kernels.latents.video.BUCKETS`, or buckets themselves; the one nearest to the video's
    aspect ratio is taken.
    clip_frames: 1 + a multiple of 4; with 1, every frame is a clip, as image stages want.
    max_clips: of each source, the first so many; None: all.
    reading: what becomes of the frames; as it stands, they are resampled to 24 a second.
    captions: what encodes captions, where they are stored too.
    mode, memory_budget [bytes]: as in `HunyuanEncoder.encode`.
    Raises ValueError for values that do not fit.
    """

    encoder: Encoder
    resolution: int | tuple[Bucket, ...] = 256
    clip_frames: int = 25
    max_clips: int | None = None
    reading: Reading = AS_MODELS
    captions: CaptionEncoder | None = None
    mode: Mode = "stream"
    memory_budget: int | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        latent_frames(self.clip_frames)
        for bucket in buckets_of(self.resolution):
            check(self.encoder, self.clip_frames, bucket, self.mode, self.memory_budget)
        if self.max_clips is not None and self.max_clips < 1:
            raise ValueError(f"max_clips: expected at least 1, or None for all, got {self.max_clips}")
        object.__setattr__(self, "fingerprint", fingerprint(self.encoder))

    def settings(self) -> dict[str, Any]:
        """What the samples depend on, as JSON values."""
        resolution = self.resolution if isinstance(self.resolution, int) else [list(one) for one in self.resolution]
        settings: dict[str, Any] = {"encoder": self.fingerprint, "resolution": resolution}
        settings |= {"clip_frames": self.clip_frames, **self.reading.settings()}
        settings |= {"mode": self.mode, "dtype": dtype_of(self.encoder)}
        optional = {
            "max_clips": self.max_clips,
            "memory_budget": self.memory_budget,
            "text_encoder": self.captions and self.captions.fingerprint,
        }
        return settings | {name: value for name, value in optional.items() if value is not None}

    def clips(self, file: str) -> Iterator[Clip]:
        """The clips of a local file, one in memory at a time. Raises VideoError where the content cannot be used, also
        after some clips; OSError where the file cannot be read.
        """
        return islice(read_clips(file, self.resolution, self.clip_frames, self.reading), self.max_clips)

    def sample(self, source: Source, sha256: str, clip: Clip, caption: str | None = None) -> Sample:
        """A clip of the source as a sample; arguments as of `Unencoded`, errors as of `sample_of`."""
        (values,) = self.latents(clip.frames[None])
        return self.sample_of(Unencoded(source, sha256, clip, caption), values)

    def sample_of(self, unencoded: Unencoded, values: Tensor) -> Sample:
        """The clip with its latent, as `latents` gives it.

        Raises VideoError where the latent, or what the caption is encoded to, is not finite.
        """
        source, sha256, clip, caption = unencoded.source, unencoded.sha256, unencoded.clip, unencoded.caption
        if not values.isfinite().all():
            found = f"found inf or nan in the one from frame {clip.first_frame} on"
            raise VideoError(f"{source.file}: expected clips that are encoded to finite latents, {found}")
        frames, height, width = clip.frames.shape[:3]
        record = ClipRecord(
            frames,
            height,
            width,
            clip.rate,
            source.path,
            clip.first_frame,
            sha256,
            caption=caption,
            start=clip.start,
            end=clip.end,
            shown_height=clip.shown_height,
            shown_width=clip.shown_width,
            colour=clip.colour,
        )
        name = f"{re.sub('[^A-Za-z0-9-]+', '-', Path(source.path).stem)[:40]}-{_short_hash(source.path, sha256)}"
        text = (
            {} if self.captions is None else self.captions.tensors(caption or "", "image" if frames == 1 else "video")
        )
        if not all(tensor.isfinite().all() for tensor in text.values()):
            raise VideoError(f"{source.file}: expected a caption that is encoded to finite values, got inf or nan")
        return Sample(f"{name}-{clip.first_frame:08d}", values, record, text)

    def latents(self, frames: Tensor) -> Tensor:
        """float16 latents [B, 16, T, h, w] of uint8 frames [B, F, H, W, 3], which go through the encoder together: the
        mean, scaled as the models take it."""
        with stage("encode clip"), torch.inference_mode():
            video = torch.cat([to_model(one) for one in frames])
            found = latent(self.encoder, video, self.mode, self.memory_budget)
        # Outside inference mode, so that the copy can be trained on.
        return found.to("cpu", torch.float16, copy=True)

    def most_together(self, size: tuple[int, int, int]) -> int:
        """How many clips of this size, (frames, height, width), the memory budget lets through together."""
        return most_together(self.encoder, size, self.mode, self.memory_budget)


def checked_mode(name: str) -> Mode:
    """Raises ValueError for a name that is none of the encoder's modes."""
    if name not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {name!r:.80}")
    return cast(Mode, name)


def encoder_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """ "float32", "bfloat16" or "float16"; without a name bfloat16 on a GPU and float32 on a CPU.

    Raises ValueError for another name.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r:.80}")
    return DTYPES[name]


def encode_video(path: str | Path, encoder: Encoder, **settings: Any) -> list[Sample]:
    """Latents [16, T, h, w], float16, of all clips of a video.

    settings: those of `Encoding`. Raises VideoError where the video cannot be used or has fewer than 5 frames,
    OSError where it cannot be read, ValueError for settings that do not fit.
    """
    encoding = Encoding(encoder, **settings)
    source, sha256 = Source(str(path), Path(path).name, named=True), content_hash(str(path))
    return [encoding.sample(source, sha256, clip) for clip in encoding.clips(source.file)]


def _short_hash(path: str, sha256: str) -> str:
    return hashlib.sha256(os.fsencode(path) + bytes.fromhex(sha256)).hexdigest()[:12]
