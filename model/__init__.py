"""The Kandinsky 5.0 diffusion transformer on k5kernels' operators."""

from model import presets, weights
from model.conditioning import TextCondition
from model.config import DENSE, AttentionConfig, CrossDiTConfig
from model.crossdit import CrossDiT

__all__ = ["DENSE", "AttentionConfig", "CrossDiT", "CrossDiTConfig", "TextCondition", "presets", "weights"]
