"""Methods of one object, and not of its class, that stand in for its own while an acceleration is on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Overlay(ABC):
    """What stands under a name of an object in place of its class's method.

    original: what the object itself, and not its class, had under that name; None for nothing.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.active = owner, name, True
        self.original = vars(owner).get(name)
        # Not through the object's own way of setting attributes, which some models extend.
        object.__setattr__(owner, name, self)

    def former(self, *args: Any, **kwargs: Any) -> Any:
        """The method as it was."""
        if self.original is None:
            return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)
        return self.original(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.instead(*args, **kwargs) if self.active else self.former(*args, **kwargs)

    @abstractmethod
    def instead(self, *args: Any, **kwargs: Any) -> Any:
        """What is done while the acceleration is on."""

    def remove(self) -> None:
        """Puts back what was there. What somebody else has put over it since stays; this one then does nothing."""
        self.active = False
        if vars(self.owner).get(self.name) is not self:
            return
        under = self.original
        while isinstance(under, Overlay) and not under.active:
            under = under.original
        if under is None:
            object.__delattr__(self.owner, self.name)
        else:
            object.__setattr__(self.owner, self.name, under)


class NoSparseParams(Overlay):
    """Instead of a mask of gigabytes that we do not read. The method also refuses sizes of no 128 pixels."""

    def instead(self, *args: Any, **kwargs: Any) -> None:
        """None, for dense attention."""


class NoOtherCache(Overlay):
    """Instead of a second cache around the same blocks."""

    def instead(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses."""
        raise ValueError("enable_cache: a cache of k5kernels is on; end it first with disable() or its `with` block")


class NotedContext(Overlay):
    """The name that a pipeline gives to a pass, where it gives one."""

    current: str | None = None

    @contextmanager
    def instead(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        """As before, and noted."""
        with self.former(name, *args, **kwargs):
            self.current = name
            try:
                yield
            finally:
                self.current = None
