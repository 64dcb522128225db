"""Tells, from what a model is called with, which step and which branch of guidance a pass is.

Nothing is counted by turns: guidance may be switched on or off midway, models may be distilled from it, and some
samplers evaluate a step twice. A pass is known by its time and its text. Times fall over a run; one that rises begins
the next. Where two passes look alike, the second is told as not certain, and has to be computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NAMES = ("cond", "uncond")  # in the order in which guided samplers call them


@dataclass(frozen=True)
class Pass:
    """One call of a model.

    branch: "cond", "uncond", then "branch 2" and so on in the order of their first calls in a run, or the name that
    the caller gave. step: from 0. begins: whether a new run begins with it. certain: whether it is surely the first
    evaluation of this branch at this step.
    """

    branch: str
    step: int
    begins: bool
    certain: bool


@dataclass
class _Branch:
    name: str
    text: Sequence[Tensor]
    step: int


class Passes:
    """The runs of one model, pass by pass."""

    def __init__(self) -> None:
        self._branches: list[_Branch] = []
        self._kind: object = None
        self._first = self._time = float("-inf")
        self._step = 0

    def tell(self, time: float, text: Sequence[Tensor], kind: object = None, name: str | None = None) -> Pass:
        """Which pass this is.

        time: of the noise, higher is noisier. text: the tensors that set the branches apart; equal values are one
        branch. kind: what stays over a run (shape, dtype, device, the sampler's list of times): another one begins a
        run. name: of the branch, where the caller knows it.
        """
        branch = self._known(text, name)
        again = branch is not None and branch.step == self._step and time == self._time
        begins = kind != self._kind or time > self._time or (again and time == self._first)
        if begins:
            self._branches, self._kind, self._first, self._step, branch = [], kind, time, 0, None
        elif time < self._time:
            self._step += 1
        self._time = time
        if branch is None:
            branch = _Branch(name or self._next_name(), text, self._step)
            self._branches.append(branch)
        branch.step = self._step
        # A repetition at the very first time is either a run that begins after one that was interrupted, or a second
        # evaluation: the counting starts anew, and nothing is believed of it.
        return Pass(branch.name, self._step, begins, certain=not again)

    def _known(self, text: Sequence[Tensor], name: str | None) -> _Branch | None:
        for branch in self._branches:
            if branch.name == name if name is not None else _equal(branch.text, text):
                return branch
        return None

    def _next_name(self) -> str:
        taken = {branch.name for branch in self._branches}
        numbered = (*NAMES, *(f"branch {number}" for number in range(2, len(taken) + 3)))
        return next(name for name in numbered if name not in taken)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        one is other or (one.device == other.device and one.dtype == other.dtype and torch.equal(one, other))
        for one, other in zip(a, b, strict=True)
    )
