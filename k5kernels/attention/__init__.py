"""Attention of the visual tokens: dense through the engine a machine has, or NABLA's block-sparse (§5.4, §7.2)."""

from k5kernels.attention.break_even import break_even
from k5kernels.attention.config import DENSE, RELEASED_WINDOW, AttentionConfig
from k5kernels.attention.engine import Call, DenseEngine, Engine
from k5kernels.attention.engines import ENGINES, EngineUnavailableError, attention, choose_engine, register_engine
from k5kernels.attention.hopper import NablaHopper
from k5kernels.attention.nabla import nabla_attention, record_block_masks

__all__ = [
    "DENSE",
    "ENGINES",
    "RELEASED_WINDOW",
    "AttentionConfig",
    "Call",
    "DenseEngine",
    "Engine",
    "EngineUnavailableError",
    "NablaHopper",
    "attention",
    "break_even",
    "choose_engine",
    "nabla_attention",
    "record_block_masks",
    "register_engine",
]
