"""The parts of a step: its operators, each timed alone, with the floating-point operations and bytes it needs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.fma_peak import FmaPeak
from k5kernels import TokenLayout
from model.linear import Linear


@dataclass
class Part:
    """Calls of one operator in one phase. operations: floating-point ones, of products alone. bytes: of arguments and
    results, each once a call: what a perfect cache would move."""

    phase: str
    name: str
    calls: int = 0
    seconds: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Roof:
    """Measured here: floating-point operations/s of a large matrix product, bytes/s of a large copy, and
    floating-point operations/s that attention can reach."""

    operations: float
    bandwidth: float
    attention: float

    def least(self, part: Part) -> float:
        """The seconds that the part takes at least under this roof."""
        rate = self.attention if "attention" in part.name else self.operations
        return max(part.operations / rate, part.bytes / self.bandwidth)

    def share(self, parts: Sequence[Part]) -> float:
        """The least time the parts could take under this roof, against the time they took."""
        return sum(self.least(part) for part in parts) / sum(part.seconds for part in parts)


class Parts(TorchDispatchMode):
    """Times every operator that runs inside, alone: the device is waited for before and after it.

    So the sum is the time without overlap, which on a GPU is more than that of a step whose launches run ahead.
    """

    def __init__(self, device: torch.device, layout: TokenLayout) -> None:
        super().__init__()
        self.device, self.layout = device, layout
        self.phase = ""
        self.found: dict[tuple[str, str], Part] = {}

    def enter(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self.phase = phase

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.is_view or function.namespace == "prim":
            return function(*args, **kwargs)
        synchronize(self.device)
        began = time.perf_counter()
        out = function(*args, **kwargs)
        synchronize(self.device)
        seconds = time.perf_counter() - began
        name = f"{function.namespace}.{function.overloadpacket.__name__}"
        part = self.found.setdefault((self.phase, name), Part(self.phase, name))
        part.calls += 1
        part.seconds += seconds
        part.operations += self._operations(function, args, kwargs, out)
        part.bytes += _bytes((args, kwargs, out))
        return out

    def _operations(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
        if function.overloadpacket in flop_registry:
            return float(flop_registry[function.overloadpacket](*args, **kwargs, out_val=out))
        count = _PRODUCTS.get(function.overloadpacket.__name__)
        return 0.0 if count is None else count(self.layout, *args)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class _Rate:
    call: Callable[[], Any]
    work: float
    best: float = 0.0


class RoofMeter:
    """Measures a roof beside a step, once a call of `measure`: a product of 4096² matrices, by the library that the
    model takes, a copy of 512 MiB and on a CPU multiplications and additions in registers."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        side, size = 4096, 2**29
        rows, layer = torch.randn(side, side, device=device).to(dtype), Linear(side, side, False, device, dtype)
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self._device = device
        self._rates = [_Rate(lambda: layer(rows), 2 * side**3), _Rate(lambda: target.copy_(source), 2 * size)]
        if device.type == "cpu":
            peak = FmaPeak()
            self._rates.append(_Rate(peak, peak.operations))

    def measure(self) -> None:
        for rate in self._rates:
            synchronize(self._device)
            began = time.perf_counter()
            rate.call()
            synchronize(self._device)
            rate.best = max(rate.best, rate.work / (time.perf_counter() - began))

    def roof(self) -> Roof:
        """The best of all calls. Attention's limit is the product's, or that of registers where it is higher."""
        product, copy, *registers = (rate.best for rate in self._rates)
        return Roof(product, copy, max(product, *registers))


def _bytes(tree: Any) -> float:
    """Of the tensors in it, those on the same memory once; an expanded tensor has the bytes it holds."""
    held = {}
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor) and leaf.is_mkldnn:  # in an order of oneDNN's own: no address, no strides
            held[id(leaf), leaf.shape] = leaf.numel() * leaf.element_size()
        elif isinstance(leaf, Tensor):
            elements = prod(size for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride)
            held[leaf.data_ptr(), leaf.shape] = elements * leaf.element_size()
    return float(sum(held.values()))


def _linear(layout: TokenLayout, x: Tensor, weight: Tensor, *rest: Any) -> float:
    return 2.0 * x.numel() * weight.shape[0]


def _dense(layout: TokenLayout, q: Tensor, k: Tensor, *rest: Any) -> float:
    return 4.0 * q.numel() * k.shape[2]


def _dense_backward(layout: TokenLayout, grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> float:
    return 2.5 * _dense(layout, q, k)


def _sparse(
    layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, indices: Tensor, block_starts: Tensor,
    *rest: Any,
) -> float:  # fmt: skip
    """offsets, indices: of a BlockMask, for all samples and heads or for each."""
    lengths, counts = block_starts.diff(), offsets.diff(dim=-1)
    queries = lengths.expand(counts.shape).flatten().repeat_interleave(counts.flatten())
    alike = q.shape[0] * q.shape[1] // (counts.shape[0] * counts.shape[1])
    return 4.0 * q.shape[-1] * alike * float((queries * lengths[indices]).sum())


def _sparse_backward(
    layout: TokenLayout, grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *lists: Any,
) -> float:  # fmt: skip
    return 2.5 * _sparse(layout, q, k, v, *lists)


def _bits(layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, bits: Tensor, offsets: Tensor, *rest: Any) -> float:
    """offsets: [B, h, N_b + 1], of which the last says how many blocks are kept; as if all were whole."""
    return 4.0 * q.shape[-1] * layout.block_side**4 * float((offsets[..., -1] - offsets[..., 0]).sum())


def _bits_backward(
    layout: TokenLayout, grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *lists: Any,
) -> float:  # fmt: skip
    return 2.5 * _bits(layout, q, k, v, *lists)


# What PyTorch's counter does not know.
_PRODUCTS: dict[str, Callable[..., float]] = {
    "_linear_pointwise": _linear,
    "_scaled_dot_product_flash_attention_for_cpu": _dense,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _dense_backward,
    "block_sparse_attention": _sparse,
    "block_sparse_attention_backward": _sparse_backward,
    "bits_attention": _bits,
    "bits_attention_backward": _bits_backward,
}
