"""Puts a cache around the blocks of a model, anybody's, and takes it away without a trace.

The list that holds the blocks stays the same object with the same blocks. While a pass of the model runs, iterating
over it gives what the cache decided: the blocks, with a note taken of what they are given and what they give, or one
function that adds the residual kept. So the decision is taken outside the blocks, which stay as compiled as they were,
and what is skipped is not even asked for: an offloaded block is not loaded.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from k5kernels.cache.magcache import Policy, Residual
from k5kernels.cache.passes import Pass, Passes
from k5kernels.cache.report import REUSED, SCHEDULED, CachedPass, CacheReport

BLOCKS = ("visual_transformer_blocks", "transformer_blocks", "single_transformer_blocks", "blocks")
TIMES, TEXTS = ("timestep", "time", "timesteps", "t"), ("encoder_hidden_states", "text", "context")


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not compiled itself, but what it calls may be: the blocks. Asked for late, as it loads PyTorch's compiler."""
    plain: Callable[..., Any] = torch.compiler.disable(function, recursive=False)
    return plain


def apply(
    model: nn.Module,
    policy: Policy,
    *,
    blocks: Sequence[str] = (),
    time: str = "",
    text: str = "",
    steps: Callable[[Tensor], int | None] = lambda time: None,
    kind: Callable[[], object] = lambda: None,
    name: Callable[[], str | None] = lambda: None,
) -> "CachedBlocks":
    """Let the policy decide on every call of the model whether its blocks run.

    model: any module whose forward iterates over lists of blocks, each called with the result of the one before: a
    tensor, or a tuple that is the next one's first arguments. blocks: the names of those lists (`nn.ModuleList`), in
    the order they run. time, text: the names of the arguments of its forward that tell step and branch; where there is
    no text, all passes are one branch. Left empty, all three are found by the names that models commonly have.
    steps: how many steps the run has, asked with its first time; None for as many as the policy has. kind, name: asked
    on each pass, as in `Passes.tell`.

    Raises ValueError where the lists or the arguments are not found. The cache is for inference: under gradients
    everything is computed.
    """
    lists = _lists(model, blocks)
    parameters = inspect.signature(type(model).forward).parameters
    arguments = (_argument(parameters, time, TIMES, "time"), _argument(parameters, text, TEXTS, "text"))
    if arguments[0] is None:
        raise ValueError(f"time: expected the name of an argument of {type(model).__name__}.forward, found none")
    return CachedBlocks(model, lists, policy, (arguments[0], arguments[1]), steps, kind, name)


class CachedBlocks:
    """A policy at work on a model, until `remove`. report: what it did. As a context manager it gives the report."""

    def __init__(
        self,
        model: nn.Module,
        lists: Sequence[nn.ModuleList],
        policy: Policy,
        arguments: tuple[str, str | None],
        steps: Callable[[Tensor], int | None],
        kind: Callable[[], object],
        name: Callable[[], str | None],
    ) -> None:
        self.report = CacheReport()
        self._policy, self._passes, self._run = policy, Passes(), -1
        self._time, self._text = arguments
        self._steps, self._kind, self._name = steps, kind, name
        self._forward = inspect.signature(type(model).forward)
        self._lists = list(lists)
        self._active = True
        self._pass: _RunningPass | None = None
        self._hooks = [
            model.register_forward_pre_hook(_uncompiled(self._before), with_kwargs=True, prepend=True),
            model.register_forward_hook(_uncompiled(self._after), always_call=True),
        ]
        for place in self._lists:
            place.__class__ = _watched(type(place), self)

    def remove(self) -> None:
        """The blocks run as before. What somebody else has put over the cache since stays. Again, it does nothing."""
        if not self._active:
            return
        self._active, self._pass = False, None
        self._policy.free()
        for hook in self._hooks:
            hook.remove()
        for place in self._lists:
            kind: type = type(place)
            while isinstance(owner := kind.__dict__.get("cached_blocks"), CachedBlocks) and not owner._active:
                kind = kind.__mro__[1]
            place.__class__ = kind

    def __enter__(self) -> CacheReport:
        return self.report

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._forward.bind_partial(model, *args, **kwargs).arguments
        time = given[self._time] if isinstance(given[self._time], Tensor) else torch.as_tensor(given[self._time])
        inputs = next(value for key, value in given.items() if isinstance(value, Tensor) and key != self._time)
        kind = (self._kind(), inputs.shape, inputs.dtype, inputs.device)
        text = tensors_in(given.get(self._text)) if self._text is not None else []
        told = self._passes.tell(float(time.max()), text, kind, self._name())
        if told.begins:
            self._run += 1
            self._policy.reset(self._steps(time))
        why = self._why_computed(told)
        if why is None and not self._policy.decide(told.branch, told.step):
            residual = self._policy.reuse(told.branch, told.step)
            error = _expected_error(self._policy, told)
            self.report.passes.append(CachedPass(self._run, told.branch, told.step, False, REUSED, error))
            self._pass = _RunningPass(residual, None)
            return
        self.report.passes.append(CachedPass(self._run, told.branch, told.step, True, why or SCHEDULED))
        record = None if why else lambda residual: self._policy.record(told.branch, told.step, residual)
        self._pass = _RunningPass(None, record)

    def _why_computed(self, told: Pass) -> str | None:
        if not told.certain:
            return "a second evaluation of this text at this time"
        return "gradients are asked for" if torch.is_grad_enabled() else None

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        self._pass = None

    def iterate(self, place: nn.ModuleList, blocks: Iterator[nn.Module]) -> Iterator[Any]:
        """What iterating over one of the lists gives."""
        running = self._pass
        if running is None or not any(place is ours for ours in self._lists):
            return blocks
        return running.iterate(list(blocks), place is self._lists[0], place is self._lists[-1])


class _RunningPass:
    """A pass of the model. residual: what stands in for the blocks, None where they run; record: takes theirs."""

    def __init__(self, residual: Residual | None, record: Callable[[Residual], None] | None) -> None:
        self._residual, self._record = residual, record
        self._inputs: tuple[Any, ...] = ()

    def iterate(self, blocks: list[Any], first: bool, last: bool) -> Iterator[Any]:
        if self._residual is not None:
            return iter([_uncompiled(self._stand_in)] if first else [])
        if self._record is not None:
            if first:
                blocks[0] = _uncompiled(self._noting_inputs(blocks[0]))
            if last:
                blocks[-1] = _uncompiled(self._noting_output(blocks[-1]))
        return iter(blocks)

    def _noting_inputs(self, block: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inputs = (*args, *kwargs.values())
            return block(*args, **kwargs)

        return run

    def _noting_output(self, block: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = block(*args, **kwargs)
            outputs = output if isinstance(output, tuple) else (output,)
            assert self._record is not None
            self._record(tuple(_difference(*pair) for pair in zip(outputs, self._inputs, strict=False)))
            self._inputs = ()
            return output

        return run

    def _stand_in(self, *args: Any, **kwargs: Any) -> Any:
        inputs, residual = (*args, *kwargs.values()), self._residual
        assert residual is not None
        outputs = tuple(
            given if added is None else given + added for given, added in zip(inputs, residual, strict=False)
        )
        return outputs if len(outputs) > 1 else outputs[0]


def _difference(output: Any, given: Any) -> Tensor | None:
    """What was added to a tensor; None for what is no tensor."""
    if output is None and given is None:
        return None
    if not (isinstance(output, Tensor) and isinstance(given, Tensor) and output.shape == given.shape):
        raise ValueError(
            "blocks: expected each to give what it is given as its first arguments, in the same shapes, got "
            f"{_kind_of(output)} for {_kind_of(given)}"
        )
    return (output - given).detach()


def _kind_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _watched(kind: type[nn.ModuleList], owner: CachedBlocks) -> type[nn.ModuleList]:
    """The class of a list that asks the cache when it is iterated over: the list's own, with that method over it."""

    def iterate(self: nn.ModuleList) -> Iterator[nn.Module]:
        return owner.iterate(self, kind.__iter__(self))

    return type(kind.__name__, (kind,), {"__iter__": _uncompiled(iterate), "cached_blocks": owner})


def _lists(model: nn.Module, names: Sequence[str]) -> list[nn.ModuleList]:
    found = [name for name in names or BLOCKS if isinstance(getattr(model, name, None), nn.ModuleList)]
    if not found or len(found) < len(names):
        expected = ", ".join(names or BLOCKS)
        raise ValueError(f"blocks: expected lists of blocks of {type(model).__name__} named {expected}, found {found}")
    return [getattr(model, name) for name in found]


def _argument(parameters: Mapping[str, Any], name: str, common: Sequence[str], meaning: str) -> str | None:
    if name and name not in parameters:
        raise ValueError(f"{meaning}: expected one of {', '.join(parameters)}, got {name!r}")
    return name or next((one for one in common if one in parameters), None)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument: itself, or the fields of an object that holds some."""
    if isinstance(value, Tensor):
        return [value]
    fields = value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [one for one in fields if isinstance(one, Tensor)]


def _expected_error(policy: Any, told: Pass) -> float:
    errors: Mapping[str, Sequence[float]] = getattr(policy, "errors", {})
    return errors[told.branch][told.step] if told.branch in errors else 0.0
