"""Which attention runs: the engines, and the rule that chooses among them (§7.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from k5kernels.attention.nabla import nabla_attention
from k5kernels.block_mask import BlockMask
from k5kernels.device import choose_device
from k5kernels.ops.block_sparse_attention import block_sparse_attention
from k5kernels.ops.nabla_mask import check_tokens
from k5kernels.token_layout import TokenLayout

STA_WINDOW = (11, 3, 3)
SD_PIXELS = 512 * 768
SD_SECONDS = 121 / 24  # a "5 s" clip has 121 frames at 24 a second


@dataclass(frozen=True)
class Package:
    """Where a dense engine comes from and which GPUs it is for: compute capabilities from lowest to highest."""

    module: str
    name: str
    lowest: tuple[int, int]
    highest: tuple[int, int] | None = None


PACKAGES = {
    "flash3": Package("flash_attn_interface", "FlashAttention-3 (flash-attention's hopper folder)", (9, 0), (9, 0)),
    "flash2": Package("flash_attn", "flash-attn (the extra k5kernels[flash])", (8, 0)),
    "sage": Package("sageattention", "sageattention (the extra k5kernels[sage])", (8, 0)),
}
ENGINES = ("auto", "sdpa", "nabla", *PACKAGES)


class EngineUnavailableError(ValueError):
    """The engine asked for cannot run here; the message says why and what would do."""


def choose_engine(height: int, width: int, seconds: float, device: torch.device | str | None = None) -> str:
    """The engine for a clip: "nabla" where a video is longer than 5 s or larger than SD, else a dense one (§7.2).

    height, width: pixels; SD is up to 512·768 of them. seconds: the length of the clip, 0 for an image, which is
    dense at every size. device: where it will run; a GPU if there is one, where None. The dense engine: the newest
    FlashAttention that is installed and fits the GPU, else SageAttention (8-bit products), else "sdpa".

    Raises ValueError where a size is not positive or the length is negative.
    """
    if height < 1 or width < 1 or seconds < 0:
        raise ValueError(f"expected positive height and width and seconds >= 0, got {height}, {width}, {seconds}")
    if seconds > SD_SECONDS or (seconds > 0 and height * width > SD_PIXELS):
        return "nabla"
    device = choose_device() if device is None else torch.device(device)
    return next((engine for engine in PACKAGES if _obstacle(engine, device) is None), "sdpa")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    engine: str = "auto",
    layout: TokenLayout | None = None,
    thr: float = 0.9,
    sta: tuple[int, int, int] | None = STA_WINDOW,
    mask: Tensor | BlockMask | None = None,
) -> Tensor:
    """Attention by the engine named: [B, h, S, D] in the dtype of q.

    q, k, v: [B, h, S, D], one floating dtype; keys and values may have another S where there is no layout.
    engine: "sdpa", "flash2", "flash3" and "sage" are dense, "nabla" is block-sparse and needs the layout. "auto" is
    an exact dense one: FlashAttention where it is installed and takes these tensors, else "sdpa"; `choose_engine`
    says when a clip wants another. layout: of self-attention; with several clips dense attention stays inside each.
    thr, sta: of "nabla". mask: for "sdpa" without a layout a bool tensor that broadcasts to [B, h, S, S_k], true
    where a query reads a key; for "nabla" a BlockMask in place of the one it would build.

    Raises ValueError where an argument does not fit the engine, and its subclass EngineUnavailableError where the
    engine's package is not installed or the device or dtype is not one it takes.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "nabla":
        return _nabla(q, k, v, layout, thr, sta, mask)
    if isinstance(mask, BlockMask):
        raise ValueError(f'mask: a BlockMask needs engine="nabla", got engine={engine!r}')
    if mask is not None and (layout is not None or engine not in ("auto", "sdpa")):
        raise ValueError(f'mask: only engine="sdpa" without a layout takes a tensor, got engine={engine!r}')
    if engine == "auto":
        exact = [name for name in ("flash3", "flash2") if mask is None and _obstacle(name, q.device, q.dtype) is None]
        engine = exact[0] if exact else "sdpa"
    elif engine != "sdpa" and (obstacle := _obstacle(engine, q.device, q.dtype)):
        raise EngineUnavailableError(f'engine {engine!r}: {obstacle}; use engine="sdpa" or "auto"')
    if engine == "sdpa":
        return _per_clip(partial(scaled_dot_product_attention, attn_mask=mask), q, k, v, layout)
    return _per_clip(_RUN[engine], q, k, v, layout)


def _nabla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout | None,
    thr: float,
    sta: tuple[int, int, int] | None,
    mask: Tensor | BlockMask | None,
) -> Tensor:
    if layout is None:
        raise ValueError('layout: engine="nabla" needs the TokenLayout of the sequence, got None')
    if mask is None:
        return nabla_attention(q, k, v, layout, thr, sta)
    if not isinstance(mask, BlockMask):
        raise ValueError(f'mask: engine="nabla" takes a BlockMask, got {type(mask).__name__}')
    return block_sparse_attention(q, k, v, mask, layout)


def _per_clip(
    dense: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout | None
) -> Tensor:
    if layout is None:
        return dense(q, k, v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tokens(name, tensor, layout)
    tokens = [T * H * W for T, H, W in layout.clips]
    if len(tokens) == 1:
        return dense(q, k, v)
    clips = zip(*(x.split(tokens, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([dense(*clip) for clip in clips], dim=2)


def _obstacle(engine: str, device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the engine cannot run on the device and, where given, in the dtype; None where it can."""
    package = PACKAGES[engine]
    if find_spec(package.module) is None:
        return f"the package {package.name} is not installed"
    if device.type != "cuda":
        return f"it runs on CUDA, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < package.lowest or (package.highest and capability > package.highest):
        span = f"{package.lowest} to {package.highest}" if package.highest else f"{package.lowest} or higher"
        return f"it is for GPUs of compute capability {span}, this one has {capability}"
    if dtype not in (None, torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, the tensors are {dtype}"
    return None


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention wants [B, S, h, D]; some releases of version 3 return (out, lse)."""
    out = import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return import_module("sageattention").sageattn(q, k, v, tensor_layout="HND")


_RUN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "flash3": partial(_flash, PACKAGES["flash3"].module),
    "flash2": partial(_flash, PACKAGES["flash2"].module),
    "sage": _sage,
}
