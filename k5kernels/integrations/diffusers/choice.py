"""Which engine and which threshold a model's attention runs with, layer by layer."""

from collections.abc import Sequence
from typing import Any

import torch

from k5kernels.attention import ENGINES, AttentionConfig, Call, EngineUnavailableError
from k5kernels.token_layout import TokenLayout

DEFAULT_THR = 0.9
FRAMES, FRAMES_A_SECOND = 4, 24  # of a cell of the latent; of a video


def configs_for(
    model: Any,
    layers: int,
    engine: str,
    thr: float | Sequence[float] | None,
    sta: tuple[int, int, int] | None,
) -> list[AttentionConfig]:
    """One for each layer.

    Raises ValueError where a setting does not fit, EngineUnavailableError where the engine cannot run here.
    """
    if thr is None:
        trained_thr, trained_sta = _trained_with(model)
        thr, sta = trained_thr, sta if sta is not None else trained_sta
    values = list(thr) if isinstance(thr, Sequence) else [thr] * layers
    if len(values) != layers:
        raise ValueError(f"thr: expected one value, or one for each of {layers} layers, got {len(values)}")
    configs = [AttentionConfig(engine, value, sta) for value in values]
    if engine != "auto":
        # Weights that are offloaded wait elsewhere than they are used.
        device = torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device
        call = Call(device, model.dtype, _head_dim(model), layout=TokenLayout(((1, 8, 8),)))
        if (reason := ENGINES[engine].why_not(call)) is not None:
            able = [name for name, other in ENGINES.items() if other.why_not(call) is None]
            raise EngineUnavailableError(f"attention={engine!r}: {reason}; here {', '.join(able)} can")
    return configs


def _trained_with(model: Any) -> tuple[float, tuple[int, int, int] | None]:
    """The threshold and the window of a model that was trained with NABLA."""
    config = model.config
    if (thr := getattr(config, "nabla_threshold", None)) is not None:
        return thr, tuple(config.nabla_window)
    if getattr(config, "attention_type", None) == "nabla" and config.attention_P is not None:
        window = (config.attention_wT, config.attention_wH, config.attention_wW)
        return config.attention_P, window if config.attention_add_sta and None not in window else None
    return DEFAULT_THR, None


def _head_dim(model: Any) -> int:
    axes = getattr(model.config, "axes_dims", None)
    return sum(axes) if axes is not None else model.config.attention_head_dim


def configs_for_clip(
    configs: Sequence[AttentionConfig],
    latents: tuple[int, int, int],
    pixels: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[AttentionConfig]:
    """The same with the engine that §7.2 names for a clip of these latents. pixels: of the side of one."""
    T, H, W = latents
    frames = FRAMES * (T - 1) + 1
    seconds = frames / FRAMES_A_SECOND if frames > 1 else 0.0
    return [config.for_clip(H * pixels, W * pixels, seconds, device, dtype) for config in configs]
