"""Small encoding jobs: an encoder that costs nothing, videos of noise, and what such a job leaves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k5kernels.latents import encode as encode_module
from k5kernels.latents.job import EncodeSummary
from k5kernels.latents.shards import Sample, read_shard
from k5kernels.latents.video import write_video
from k5kernels.vae import HunyuanEncoder, VAEConfig
from k5kernels.vae.posterior import Posterior


class CountingEncoder(HunyuanEncoder):
    """Stands in where the latents do not matter: means of 8×8 pixels, mixed by the first convolution's weights.

    It has no other layers, whose weights every job would hash. Counts the clips it encodes and notes whether gradients
    were on.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(VAEConfig(widths=(16, 16, 16, 16), groups=16, layers_per_block=1))
        for name in [name for name, _ in self.named_children() if name != "conv_in"]:
            delattr(self, name)
        self.clips, self.grad = 0, False

    def encode(self, video: Tensor, *arguments: Any, **settings: Any) -> Posterior:
        weight = self.conv_in.conv.weight
        mean = self(video.to(weight.device, weight.dtype)) / self.config.scaling_factor
        return Posterior(mean, torch.zeros_like(mean))

    def forward(self, video: Tensor) -> Tensor:
        self.clips += 1
        self.grad |= torch.is_grad_enabled()
        means = video[:, :, ::4].unfold(3, 8, 8).unfold(4, 8, 8).mean((-1, -2))
        conv = self.conv_in.conv
        return F.conv3d(means, conv.weight.sum((2, 3, 4), keepdim=True), conv.bias)


def make_video(path: Path, frames: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = torch.rand(frames, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    image = noise.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)
    write_video(path, (image * 255).to(torch.uint8), Fraction(24))
    return path


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def shards(out: Path) -> list[list[Sample]]:
    return [list(read_shard(path)) for path in sorted(out.glob("*.tar"))]


def starts(out: Path) -> list[tuple[str, int]]:
    """(stem of the source, first frame) of every clip, in order."""
    return [(Path(s.record.source).stem, s.record.first_frame) for shard in shards(out) for s in shard]


Encode = Callable[..., EncodeSummary]
WHOLE = [("a", 0), ("a", 5), ("b", 0), ("c", 0), ("c", 5), ("c", 10)]


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


@contextmanager
def failing(name: str, error: BaseException) -> Iterator[None]:
    """Reading the frames of the video of that name raises the error."""
    real = encode_module.read_clips

    def read(path: str, *arguments: Any) -> Any:
        if Path(path).name == name:
            raise error
        return real(path, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "read_clips", read)
        yield
