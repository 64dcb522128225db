"""How the visual tokens of a sequence stand: clips, blocks and fractal order (§5.4).

A clip is a grid of T latent frames of H×W tokens. Each frame is cut into P×P patches; the tokens of a patch stand
together and are one block, patches are row-major, frames follow in time, clips in the order given. Where a side is
no multiple of P, the blocks at the right and bottom edge are smaller: no token is padded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Clip = tuple[int, int, int]
Build = Callable[["TokenLayout", torch.device], Tensor]


@dataclass(frozen=True)
class TokenLayout:
    """The order of S tokens in N_b blocks; hashable, so that equal layouts share their tensors.

    clips: token grids (T, H, W), all sides at least 1; one grid alone stands for one clip. patch: the side P of a
    block in tokens. The tensors returned are shared and must not be written to.

    Raises ValueError where a grid or the patch does not fit.
    """

    clips: tuple[Clip, ...]
    patch: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "clips", _as_clips(self.clips))
        if not _is_integer(self.patch) or self.patch < 1:
            raise ValueError(f"patch: expected a positive integer, got {self.patch!r}")

    @property
    def tokens(self) -> int:
        """S, the tokens of all clips."""
        return self.clip_tokens[-1]

    @property
    def blocks(self) -> int:
        """N_b, the blocks of all clips."""
        return self.clip_blocks[-1]

    @property
    def clip_tokens(self) -> tuple[int, ...]:
        """The token each clip starts at, then S."""
        return tuple(accumulate((T * H * W for T, H, W in self.clips), initial=0))

    @property
    def clip_blocks(self) -> tuple[int, ...]:
        """The block each clip starts at, then N_b."""
        P = self.patch
        return tuple(accumulate((T * _ceil_div(H, P) * _ceil_div(W, P) for T, H, W in self.clips), initial=0))

    @property
    def full_blocks(self) -> bool:
        """Whether every block has P² tokens."""
        return all(H % self.patch == 0 and W % self.patch == 0 for _, H, W in self.clips)

    def block_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """The token each block starts at, then S: int64 [N_b + 1]."""
        return _shared(_block_starts, self, device)

    def clip_block_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """The block each clip starts at, then N_b: int64 [clips + 1]."""
        return _shared(_clip_block_starts, self, device)

    def block_coordinates(self, device: torch.device | str = "cpu") -> Tensor:
        """(clip, t, y, x) of each block, in blocks: int64 [N_b, 4]."""
        return _shared(_block_coordinates, self, device)

    def permutation(self, device: torch.device | str = "cpu") -> Tensor:
        """For each fractal position the row-major token there, clips one after the other: int64 [S]."""
        return _shared(_permutation, self, device)

    def inverse_permutation(self, device: torch.device | str = "cpu") -> Tensor:
        """For each row-major token its fractal position: int64 [S]."""
        return _shared(_inverse_permutation, self, device)


torch.utils._pytree.register_constant(TokenLayout)


def block_tokens(block_starts: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of each block: int64 [N_b, P²], and where there is one: bool [N_b, P²] (elsewhere token 0 stands)."""
    lengths = block_starts.diff()[:, None]
    inside = torch.arange(int(lengths.max()), device=block_starts.device)
    there = inside < lengths
    return (block_starts[:-1, None] + inside).where(there, 0), there


def to_blocks(x: Tensor, block_starts: Tensor) -> Tensor:
    """x: [..., S, D] to [..., N_b, P², D], with zeros where a block has fewer than P² tokens."""
    tokens, there = block_tokens(block_starts)
    if tokens.numel() == x.shape[-2]:
        return x.unflatten(-2, tokens.shape)
    return x[..., tokens, :].masked_fill_(~there[..., None], 0)


def from_blocks(blocks: Tensor, block_starts: Tensor) -> Tensor:
    """Undo `to_blocks`: [B, h, N_b, P², ...] to a contiguous [B, h, S, ...]."""
    _, there = block_tokens(block_starts)
    if bool(there.all()):
        return blocks.flatten(2, 3).contiguous()
    return blocks[:, :, there].contiguous()


def _as_clips(clips: Any) -> tuple[Clip, ...]:
    several = (clips,) if _is_grid(clips) else clips
    if not isinstance(several, (tuple, list)) or not several or not all(_is_grid(clip) for clip in several):
        raise ValueError(f"clips: expected one (T, H, W) of positive integers or several, got {clips!r}")
    return tuple((T, H, W) for T, H, W in several)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_grid(clip: object) -> bool:
    return isinstance(clip, (tuple, list)) and len(clip) == 3 and all(_is_integer(side) and side >= 1 for side in clip)


def _ceil_div(length: int, patch: int) -> int:
    return (length + patch - 1) // patch


def _shared(build: Build, layout: TokenLayout, device: torch.device | str) -> Tensor:
    """The layout's tensor, built once, except where a compiler or another mode would put its own in the cache."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return build(layout, torch.device(device))
    return _cached(build, layout, torch.device(device))


@lru_cache(maxsize=256)
def _cached(build: Build, layout: TokenLayout, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for a backward
        return build(layout, device)


def _block_starts(layout: TokenLayout, device: torch.device) -> Tensor:
    lengths = torch.cat([_block_lengths(clip, layout.patch, device) for clip in layout.clips])
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _clip_block_starts(layout: TokenLayout, device: torch.device) -> Tensor:
    return torch.tensor(layout.clip_blocks, dtype=torch.int64, device=device)


def _block_coordinates(layout: TokenLayout, device: torch.device) -> Tensor:
    numbered = enumerate(layout.clips)
    return torch.cat([_clip_block_coordinates(number, clip, layout.patch, device) for number, clip in numbered])


def _permutation(layout: TokenLayout, device: torch.device) -> Tensor:
    starts = zip(layout.clip_tokens[:-1], layout.clips, strict=True)
    return torch.cat([start + _clip_permutation(clip, layout.patch, device) for start, clip in starts])


def _inverse_permutation(layout: TokenLayout, device: torch.device) -> Tensor:
    return torch.argsort(_permutation(layout, device))


def _block_lengths(clip: Clip, patch: int, device: torch.device) -> Tensor:
    T, H, W = clip
    heights = _side_lengths(H, patch, device)
    widths = _side_lengths(W, patch, device)
    return (heights[:, None] * widths).flatten().repeat(T)


def _side_lengths(length: int, patch: int, device: torch.device) -> Tensor:
    starts = torch.arange(_ceil_div(length, patch), device=device) * patch
    return (length - starts).clamp(max=patch)


def _clip_block_coordinates(number: int, clip: Clip, patch: int, device: torch.device) -> Tensor:
    T, H, W = clip
    t, y, x = torch.meshgrid(
        torch.arange(T, device=device),
        torch.arange(_ceil_div(H, patch), device=device),
        torch.arange(_ceil_div(W, patch), device=device),
        indexing="ij",
    )
    return torch.stack([torch.full_like(t, number), t, y, x], dim=-1).flatten(0, 2)


def _clip_permutation(clip: Clip, patch: int, device: torch.device) -> Tensor:
    """Sort the tokens of a frame by (patch row, patch column, row inside, column inside)."""
    T, H, W = clip
    y = torch.arange(H, device=device)[:, None]
    x = torch.arange(W, device=device)
    patch_number = (y // patch) * _ceil_div(W, patch) + x // patch
    rank = (patch_number * patch + y % patch) * patch + x % patch
    frame = torch.argsort(rank.flatten())
    return (torch.arange(T, device=device)[:, None] * (H * W) + frame).flatten()
