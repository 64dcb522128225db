"""Video files for tests."""

from fractions import Fraction
from pathlib import Path

import av
import torch
from torch import Tensor

RATE = Fraction(30000, 1001)


def moving_gradient(frames: int, height: int, width: int) -> Tensor:
    """Smooth frames that differ from one another: uint8 [F, H, W, 3]."""
    y = torch.linspace(0, 120, height)[None, :, None, None].expand(frames, height, width, 1)
    x = torch.linspace(0, 200, width)[None, None, :, None].expand(frames, height, width, 1)
    t = torch.arange(frames)[:, None, None, None].expand(frames, height, width, 1) * 8.0
    return torch.cat([x, y + t, 255 - x], dim=-1).clamp(0, 255).round().to(torch.uint8)


def remux(source: Path, target: Path, **options: str) -> None:
    """The same packets in another container, or in another order of the same one."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame(format="s16", layout="mono", samples=800)
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
