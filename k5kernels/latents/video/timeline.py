"""Time stamps made whole: missing ones filled in, backward ones held, and breaks found."""

from dataclasses import dataclass, field
from fractions import Fraction

# Stamps that go back by more than this many seconds, or this many frames, start anew: less is disorder.
BACKWARD_SECONDS, BACKWARD_FRAMES = Fraction(1, 4), Fraction(5, 2)
# A hole of more than this many seconds, and this many frames, is a break: what comes then stands alone. Where stamps
# may start anew (transport streams), a shorter one is.
GAP_SECONDS, GAP_SECONDS_IN_JOINED, GAP_FRAMES = Fraction(10), Fraction(1), 4
# A longer hole is a pause, in which the frame before it stays on the screen, where it ends within the duration that
# the file announces: a slide show's pauses do, a damaged stamp does not. No pause is longer than this [s].
MAX_PAUSE = Fraction(3600)
# How much later than announced a file may end [s].
SLACK = Fraction(1)


@dataclass
class Timeline:
    """Places frames, one after the other, in the order in which they are shown.

    step: duration of a frame [s] where the file does not say. may_be_joined: whether stamps may start anew.
    announced: when the file ends, as it says itself [s]; 0 where it does not.
    """

    step: Fraction
    may_be_joined: bool
    announced: Fraction = Fraction(0)
    last: Fraction | None = field(default=None, init=False)
    _shift: Fraction = field(default=Fraction(0), init=False)

    def place(self, stamp: Fraction | None, new_part: bool = False) -> tuple[Fraction, bool]:
        """(time [s], whether a break lies before it) of a frame with this stamp [s], None where it has none.

        new_part: the decoder has started anew before this frame. After a break backward, time goes on from the end of
        what came before.
        """
        if self.last is None:
            self.last = stamp or Fraction(0)
            return self.last, True
        following = self.last + self.step
        if stamp is None:
            self.last = following
            return self.last, new_part
        time, broken = stamp + self._shift, new_part
        if time < self.last - max(BACKWARD_SECONDS, BACKWARD_FRAMES * self.step) or (new_part and time < following):
            self._shift += following - time
            time, broken = following, True
        elif time > self.last + max(self._gap, GAP_FRAMES * self.step) and not self.is_pause(self.last, time):
            broken = True
        self.last = max(time, self.last)
        return self.last, broken

    def is_pause(self, start: Fraction, end: Fraction) -> bool:
        """Whether a frame may stay on the screen for so long [s]."""
        return not self.may_be_joined and end - start <= MAX_PAUSE and end <= self.announced + SLACK

    @property
    def _gap(self) -> Fraction:
        return GAP_SECONDS_IN_JOINED if self.may_be_joined else GAP_SECONDS

    def is_jump(self, before: Fraction | None, after: Fraction | None) -> bool:
        """Whether stamps [s] of two packets that follow one another in the file lie on two sides of a break."""
        if before is None or after is None:
            return False
        # Decoding stamps, as these are, never go back within one transport stream.
        back = BACKWARD_FRAMES * self.step if self.may_be_joined else max(BACKWARD_SECONDS, BACKWARD_FRAMES * self.step)
        return after < before - back or after > before + max(self._gap, GAP_FRAMES * self.step)
