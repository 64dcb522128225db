"""The attention engines there are, the call that runs one, and the rule that chooses one for a clip (§7.2)."""

import torch
from torch import Tensor

from k5kernels.attention.engine import Call, Engine
from k5kernels.attention.flash import FlashAttention2, FlashAttention3, FlashAttention4
from k5kernels.attention.flex import Flex
from k5kernels.attention.nabla import Nabla
from k5kernels.attention.native import Native
from k5kernels.attention.sage import SageAttention
from k5kernels.attention.sdpa import SDPA
from k5kernels.block_mask import BlockMask
from k5kernels.device import choose_device
from k5kernels.ops.nabla_mask import check_tokens
from k5kernels.token_layout import TokenLayout

SD_PIXELS = 512 * 768
SD_SECONDS = 121 / 24  # a "5 s" clip has 121 frames at 24 a second
KANDINSKY_HEAD_DIM = 128  # of the larger models; the others have 64

# In order of preference: of those that can run a call, the first is taken.
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        FlashAttention3(),
        FlashAttention4(),
        FlashAttention2(),
        SageAttention(),
        SDPA(),
        Native(),
        Nabla(),
        Flex(),
    )
}


class EngineUnavailableError(ValueError):
    """The engine asked for cannot run this call here; the message says why and which can."""


def register_engine(engine: Engine) -> None:
    """Make an engine of one's own known by its name: to `attention`, AttentionConfig, `k5 info` and all models.

    It stands last in order of preference: "auto" and `choose_engine` take one of this library before it.

    Raises ValueError where the name is taken.
    """
    if engine.name in ("auto", *ENGINES):
        raise ValueError(f"engine: expected a name other than {', '.join(('auto', *ENGINES))}, got {engine.name!r}")
    ENGINES[engine.name] = engine


def check_engine(name: str) -> None:
    """Raise ValueError where there is no engine of that name."""
    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine: expected one of {', '.join(('auto', *ENGINES))}, got {name!r}")


def choose_engine(
    height: int,
    width: int,
    seconds: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """The engine to sample a clip with: a sparse one where a video is longer than 5 s or larger than SD (§7.2).

    height, width: pixels; SD is up to 512·768 of them. seconds: the length of the clip, 0 for an image, which is
    dense at every size. device: where it will run; a GPU if there is one, where None. dtype: that attention will
    compute in. The dense engine is the first that can run there of FlashAttention-3, -4 and -2,
    SageAttention and PyTorch's own.

    Raises ValueError where a size is not positive or the length is negative.
    """
    for name, size in (("height", height), ("width", width)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1 pixel, got {size}")
    if seconds < 0:
        raise ValueError(f"seconds: expected 0 for an image or the length of a video, got {seconds}")
    sparse = seconds > SD_SECONDS or (seconds > 0 and height * width > SD_PIXELS)
    device = choose_device() if device is None else torch.device(device)
    call = Call(device, dtype, KANDINSKY_HEAD_DIM, layout=TokenLayout(((1, 1, 1),)))
    able = (engine for engine in ENGINES.values() if engine.why_not(call) is None)
    return next(engine.name for engine in able if (engine.kind == "sparse") == sparse)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    engine: str = "auto",
    layout: TokenLayout | None = None,
    thr: float = 0.9,
    sta: tuple[int, int, int] | None = None,
    mask: Tensor | BlockMask | None = None,
) -> Tensor:
    """Attention by the engine named: [B, h, S, D] in the dtype of q (under autocast in autocast's).

    q, k, v: [B, h, S, D], one floating dtype; keys and values may have another S where there is no layout.
    engine: a name of `ENGINES`: "sdpa", "native" (on CPUs, with a layout), "flash2", "flash3", "flash4" and "sage" are
    dense, "nabla" is block-sparse and needs the layout, "flex" is the same by PyTorch's FlexAttention. "auto" is an
    exact dense one: FlashAttention where it is installed and takes this call, else "sdpa"; `choose_engine` says when a
    clip wants another. layout: of self-attention; with several clips dense attention stays inside each.
    thr, sta: of "nabla" and "flex", as in `nabla_attention`. mask: for "sdpa" without a layout a bool tensor that
    broadcasts to [B, h, S, S_k], true where a query reads a key; for "nabla" and "flex" a BlockMask in place of the one
    they would build.

    Raises ValueError where an argument is wrong, and its subclass EngineUnavailableError where the engine cannot run
    the call: the package is missing, or the device, dtype, head dim, mask or backward is not one it has.
    """
    check_engine(engine)
    if layout is not None:
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            check_tokens(name, tensor, layout)
    call = Call.of(q, k, v, layout, mask, thr, sta)
    return _engine_for(engine, call).run(q, k, v, call)


def _engine_for(name: str, call: Call) -> Engine:
    """The engine named, or for "auto" the first exact one that can; EngineUnavailableError where it cannot."""
    exact = [engine for engine in ENGINES.values() if engine.kind == "exact"]
    for engine in exact if name == "auto" else [ENGINES[name]]:
        if engine.why_not(call) is None:
            return engine
    raise EngineUnavailableError(_refusal(name, call))


def _refusal(name: str, call: Call) -> str:
    reasons = {engine.name: engine.why_not(call) for engine in ENGINES.values()}
    if name == "auto":
        why = "; ".join(f"{exact}: {reasons[exact]}" for exact, engine in ENGINES.items() if engine.kind == "exact")
    else:
        why = str(reasons[name])
    able = [other for other, reason in reasons.items() if reason is None]
    return f"engine {name!r}: {why}; {' or '.join(map(repr, able)) or 'no engine'} can run this call"
