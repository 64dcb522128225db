"""How the visual tokens of a sequence are ordered: clips, blocks and fractal order (§5.4).

A clip is a grid of T latent frames of H×W tokens. Each frame is cut into blocks of P×P neighbouring tokens. Fractal
order keeps the tokens of a block together, row by row, the blocks of a frame row by row, then frame after frame and
clip after clip. Where P does not divide H or W, the blocks at the bottom and right edge are smaller: no token is added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from k5kernels.tensor_cache import cached_tensors

Clip = tuple[int, int, int]
Build = Callable[["TokenLayout", torch.device], Tensor]


@dataclass(frozen=True)
class TokenLayout:
    """The order of S tokens in N_b blocks. Hashable: equal layouts share their tensors.

    clips: token grids (T, H, W), all sides at least 1; a single grid stands for one clip. block_side: P, the side of a
    block in tokens. The tensors returned are shared between callers: do not write to them.

    Raises ValueError where a grid or the side is not made of positive integers.
    """

    clips: tuple[Clip, ...]
    block_side: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "clips", _as_clips(self.clips))
        if not _is_integer(self.block_side) or self.block_side < 1:
            raise ValueError(f"block_side: expected a positive integer, got {self.block_side!r}")

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
        """The first token of each clip, then S."""
        return tuple(accumulate((T * H * W for T, H, W in self.clips), initial=0))

    @property
    def clip_blocks(self) -> tuple[int, ...]:
        """The first block of each clip, then N_b."""
        grids = (self.block_grid(number) for number in range(len(self.clips)))
        return tuple(accumulate((T * rows * columns for T, rows, columns in grids), initial=0))

    @property
    def max_block_tokens(self) -> int:
        """Tokens of the largest block: P² unless every clip is narrower or lower than P."""
        P = self.block_side
        return reduce(torch.sym_max, (torch.sym_min(H, P) * torch.sym_min(W, P) for _, H, W in self.clips))

    @property
    def max_clip_blocks(self) -> int:
        """Blocks of the largest clip."""
        return reduce(torch.sym_max, (end - start for start, end in pairwise(self.clip_blocks)))

    @property
    def full_blocks(self) -> bool:
        """Whether every block has P² tokens."""
        return all(H % self.block_side == 0 and W % self.block_side == 0 for _, H, W in self.clips)

    def block_grid(self, clip: int) -> Clip:
        """(T, rows, columns) of the blocks of the clip with this number."""
        return _blocks_of(self.clips[clip], self.block_side)

    def block_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """The first token of each block, then S: int64 [N_b + 1]."""
        return _shared(_block_starts, self, device)

    def clip_block_starts(self, device: torch.device | str = "cpu") -> Tensor:
        """The first block of each clip, then N_b: int64 [clips + 1]."""
        return _shared(_clip_block_starts, self, device)

    def block_coordinates(self, device: torch.device | str = "cpu") -> Tensor:
        """(clip, t, y, x) of each block, counted in blocks: int64 [N_b, 4]."""
        return _shared(_block_coordinates, self, device)

    def permutation(self, device: torch.device | str = "cpu") -> Tensor:
        """For each position in fractal order the row-major number of its token, clip after clip: int64 [S]."""
        return _shared(_permutation, self, device)

    def inverse_permutation(self, device: torch.device | str = "cpu") -> Tensor:
        """For each row-major token its position in fractal order: int64 [S]."""
        return _shared(_inverse_permutation, self, device)


def block_tokens(block_starts: Tensor, max_block_tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens of each block, int64 [N_b, max_block_tokens], and which of them exist, bool of the same shape.

    Token 0 fills the places that a smaller block leaves. block_starts, max_block_tokens: of a `TokenLayout`; the size
    is given so that it need not be read from the device.
    """
    inside = torch.arange(max_block_tokens, device=block_starts.device)
    exists = inside < block_starts.diff()[:, None]
    return (block_starts[:-1, None] + inside).where(exists, 0), exists


def to_blocks(x: Tensor, block_starts: Tensor, max_block_tokens: int) -> Tensor:
    """[..., S, D] to [..., N_b, max_block_tokens, D], with zeros behind the tokens of a smaller block."""
    tokens, exists = block_tokens(block_starts, max_block_tokens)
    if tokens.numel() == x.shape[-2]:
        return x.unflatten(-2, tokens.shape)
    return x[..., tokens, :].masked_fill_(~exists[..., None], 0)


def from_blocks(blocks: Tensor, block_starts: Tensor, tokens: int) -> Tensor:
    """Undo `to_blocks`: [B, h, N_b, max_block_tokens, ...] to a contiguous [B, h, S, ...]. tokens: S."""
    flat = blocks.flatten(2, 3)
    if flat.shape[2] == tokens:
        return flat.contiguous()
    token = torch.arange(tokens, device=blocks.device)
    block = torch.searchsorted(block_starts, token, right=True) - 1
    return flat.index_select(2, block * blocks.shape[3] + token - block_starts[block])


def _as_clips(clips: Any) -> tuple[Clip, ...]:
    several = (clips,) if _is_grid(clips) else clips
    if not isinstance(several, (tuple, list)) or not several or not all(_is_grid(clip) for clip in several):
        raise ValueError(f"clips: expected one (T, H, W) of positive integers or several, got {clips!r}")
    return tuple((T, H, W) for T, H, W in several)


def _is_integer(value: object) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_grid(clip: object) -> bool:
    return isinstance(clip, (tuple, list)) and len(clip) == 3 and all(_is_integer(side) and side >= 1 for side in clip)


def _blocks_of(clip: Clip, block_side: int) -> Clip:
    T, H, W = clip
    return T, _ceil_div(H, block_side), _ceil_div(W, block_side)


def _ceil_div(length: int, side: int) -> int:
    return (length + side - 1) // side


def _shared(build: Build, layout: TokenLayout, device: torch.device | str) -> Tensor:
    return _built(build, layout, torch.device(device))


@cached_tensors(maxsize=256)
def _built(build: Build, layout: TokenLayout, device: torch.device) -> Tensor:
    return build(layout, device)


# The functions below compute on the device alone: copying a Python list to a GPU would synchronize with it.


def _block_starts(layout: TokenLayout, device: torch.device) -> Tensor:
    lengths = torch.cat([_block_lengths(clip, layout.block_side, device) for clip in layout.clips])
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _clip_block_starts(layout: TokenLayout, device: torch.device) -> Tensor:
    return torch.cat([torch.full((1,), start, dtype=torch.int64, device=device) for start in layout.clip_blocks])


def _block_coordinates(layout: TokenLayout, device: torch.device) -> Tensor:
    return torch.cat([_clip_block_coordinates(layout, number, device) for number in range(len(layout.clips))])


def _permutation(layout: TokenLayout, device: torch.device) -> Tensor:
    starts = zip(layout.clip_tokens[:-1], layout.clips, strict=True)
    return torch.cat([start + _clip_permutation(clip, layout.block_side, device) for start, clip in starts])


def _inverse_permutation(layout: TokenLayout, device: torch.device) -> Tensor:
    return torch.argsort(_permutation(layout, device))


def _block_lengths(clip: Clip, block_side: int, device: torch.device) -> Tensor:
    _, H, W = clip
    _, y, x = _places(_blocks_of(clip, block_side), device)
    return (H - y * block_side).clamp(max=block_side) * (W - x * block_side).clamp(max=block_side)


def _clip_block_coordinates(layout: TokenLayout, number: int, device: torch.device) -> Tensor:
    t, y, x = _places(layout.block_grid(number), device)
    return torch.stack([torch.full_like(t, number), t, y, x], dim=-1)


def _places(grid: Clip, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(t, y, x) of each block of a grid, by arithmetic: broadcasting symbolic sizes would ask which of them are 1."""
    T, rows, columns = grid
    number = torch.arange(T * rows * columns, device=device)
    return number // (rows * columns), number // columns % rows, number % columns


def _clip_permutation(clip: Clip, block_side: int, device: torch.device) -> Tensor:
    """Sort the tokens of a frame by (block row, block column, row inside, column inside)."""
    T, H, W = clip
    y = torch.arange(H, device=device)[:, None]
    x = torch.arange(W, device=device)
    block = (y // block_side) * _ceil_div(W, block_side) + x // block_side
    rank = (block * block_side + y % block_side) * block_side + x % block_side
    frame = torch.argsort(rank.flatten())
    return (torch.arange(T, device=device)[:, None] * (H * W) + frame).flatten()
