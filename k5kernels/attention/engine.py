"""What an attention engine is: one object that says which calls it can run, and runs them.

Adding one takes a subclass of `Engine` and a line in the table of k5kernels/attention/engines.py; from outside the
library, `register_engine`. Everything that names or chooses an engine asks these objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch
from torch import Tensor

from k5kernels.block_mask import BlockMask
from k5kernels.token_layout import TokenLayout

HALF_DTYPES = (torch.float16, torch.bfloat16)
Capability = tuple[int, int]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Call:
    """A call of attention without the values of its tensors: what an engine needs to know to accept or refuse it.

    device: of q, k and v. dtype: that attention computes in, which under autocast is autocast's. head_dim: D.
    backward: whether gradients will be asked for. layout, mask, thr, sta: as in `attention`.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    backward: bool = False
    layout: TokenLayout | None = None
    mask: Tensor | BlockMask | None = None
    thr: float = 0.9
    sta: tuple[int, int, int] | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: TokenLayout | None = None,
        mask: Tensor | BlockMask | None = None,
        thr: float = 0.9,
        sta: tuple[int, int, int] | None = None,
    ) -> "Call":
        """The call with these arguments."""
        dtype = q.dtype
        if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(q.device.type)
        backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        return cls(q.device, dtype, q.shape[-1], backward, layout, mask, thr, sta)


class Engine(ABC):
    """A way to compute attention.

    name: what callers ask for. kind: "exact" gives softmax attention up to rounding, "quantized" computes its products
    in 8 bits, "sparse" leaves out blocks of keys by thr and sta.
    """

    name: str
    kind: Literal["exact", "quantized", "sparse"] = "exact"

    @abstractmethod
    def why_not(self, call: Call) -> str | None:
        """Why it cannot run this call here, in words that name the argument where one is at fault; None where it can.

        Asked while a model is compiled too, and before there are tensors: it looks at the call alone.
        """

    @abstractmethod
    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """[B, h, S, D] in the dtype of q (under autocast in autocast's), for a call that `why_not` accepts."""


class DenseEngine(Engine):
    """An engine that knows nothing of clips: with a layout of several it is run on each clip alone."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of q to all of k and v, or where a bool mask is true: [B, h, S, D]."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention inside each clip of the layout; over the whole sequence where there is none."""
        mask = call.mask if isinstance(call.mask, Tensor) else None
        if call.layout is None or len(call.layout.clips) == 1:
            return self.attend(q, k, v, mask)
        tokens = [T * H * W for T, H, W in call.layout.clips]
        clips = zip(q.split(tokens, dim=2), k.split(tokens, dim=2), v.split(tokens, dim=2), strict=True)
        return torch.cat([self.attend(*clip, mask=mask) for clip in clips], dim=2)


class PackageEngine(DenseEngine):
    """A dense engine for NVIDIA GPUs that a package brings, which is imported when it is first run.

    module: the package's, as imported. package: what to install. lowest, highest: the compute capabilities it is for.
    head_dims: those it takes. has_backward: whether it is differentiable. It takes float16 and bfloat16, and no mask.
    """

    module: str
    package: str
    lowest: Capability
    highest: Capability | None = None
    head_dims: range | tuple[int, ...]
    has_backward: bool = True

    def why_not(self, call: Call) -> str | None:
        """Device, package, GPU, dtype, head dim, mask and gradients, asked in this order."""
        if call.device.type != "cuda":
            return f"it runs on CUDA, the tensors are on {call.device.type}"
        if not _is_installed(self.module):
            return f"the package {self.package} is not installed"
        capability = _capability(call.device)
        if capability < self.lowest or (self.highest is not None and capability > self.highest):
            span = f"{self.lowest} or higher" if self.highest is None else f"{self.lowest} to {self.highest}"
            return f"it is for GPUs of compute capability {span}, this one has {capability}"
        if call.dtype not in HALF_DTYPES:
            return f"it takes float16 and bfloat16, the tensors are {str(call.dtype).removeprefix('torch.')}"
        if call.head_dim not in self.head_dims:
            return f"it takes {_in_words(self.head_dims)}, the tensors have {call.head_dim}"
        if call.mask is not None:
            return f"mask: it takes none, got {type(call.mask).__name__}"
        if call.backward and not self.has_backward:
            return "it has no backward, and q, k or v require gradients"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """As of every dense engine, in the dtype of the call: these packages do not know autocast."""
        return super().run(q.to(call.dtype), k.to(call.dtype), v.to(call.dtype), call)


def _in_words(head_dims: range | tuple[int, ...]) -> str:
    if isinstance(head_dims, range):
        return f"head dims that are multiples of {head_dims.step} up to {head_dims[-1]}"
    return f"head dims {', '.join(map(str, head_dims))}"


def _constant(answer: Callable[..., Answer]) -> Callable[..., Answer]:
    """What `torch.compiler.assume_constant_result` does, which would import the compiler and take seconds to do it."""
    answer.__dict__["_dynamo_marked_constant"] = True
    return answer


# A compiler that traces attention takes the two answers below as they are: they do not change while a process runs.
@_constant
def _is_installed(module: str) -> bool:
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:  # of the package that it would be in
        return False
    # FlashAttention-4 alone leaves a folder `flash_attn` without the module that version 2 has there.
    return spec is not None and spec.origin is not None


@_constant
def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device)
