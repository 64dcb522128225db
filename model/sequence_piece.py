"""The piece of a sequence that one of several processes holds: sequence parallelism (§6.1).

Each process has all weights of a block and a run of the tokens, and only self-attention has to see them all. Around it
the processes change from pieces of the sequence with all heads to the whole sequence with some of the heads, and back:
two collectives a block. What moves the tokens is an `Exchange`; nothing here knows of processes.

Shapes: B batch, S tokens of the sequence, s of the piece, h heads, D head dim, N = B · clips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from k5kernels.token_layout import TokenLayout

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Exchange(Protocol):
    """What the processes that share a sequence do together; this one is number `rank` of `ranks`."""

    rank: int
    ranks: int

    def around(self, attend: Attend, tokens: int) -> Attend:
        """Attention of this process's s of all `tokens`: q, k, v [B, h, s, D] → [B, h, s, D].

        attend is called once, with the whole sequence and h / ranks heads.
        """

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """[B, s, c] of each process → [B, S, c] on all of them."""


@dataclass(frozen=True)
class SequencePiece:
    """A run of the tokens of a layout.

    tokens: which. layout: of them alone, one clip for each clip they belong to; it counts their tokens and knows
    nothing of their places, which self-attention alone needs. first, last: the clips they belong to are
    clips[first:last] of the sequence's `clips`.
    """

    tokens: slice
    layout: TokenLayout
    first: int
    last: int
    clips: int

    def rows(self, x: Tensor) -> Tensor:
        """Of x [N, ...], a row for each clip of each sample, the rows of this piece's clips."""
        return x if self.clips == 1 else x.unflatten(0, (-1, self.clips))[:, self.first : self.last].flatten(0, 1)


def piece_lengths(tokens: int, ranks: int) -> list[int]:
    """How many tokens each process holds; they differ by one at most, the first have more.

    Raises ValueError where a process would hold none.
    """
    if tokens < ranks:
        raise ValueError(
            f"sequence: expected at least one token for each of the {ranks} processes that share it, got {tokens}; "
            "give fewer to --sequence"
        )
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def sequence_piece(layout: TokenLayout, rank: int, ranks: int) -> SequencePiece:
    """The piece of process number `rank`. Raises ValueError as `piece_lengths`."""
    lengths = piece_lengths(layout.tokens, ranks)
    start = sum(lengths[:rank])
    end = start + lengths[rank]
    counts = [min(end, stop) - max(start, begin) for begin, stop in pairwise(layout.clip_tokens)]
    inside = [number for number, count in enumerate(counts) if count > 0]
    own = TokenLayout(tuple((counts[number], 1, 1) for number in inside))
    return SequencePiece(slice(start, end), own, inside[0], inside[-1] + 1, len(layout.clips))
