"""The Kandinsky 5.0 diffusion transformer on k5kernels' operators."""

from k5_command import stop_imports_in_one_line

stop_imports_in_one_line("model")

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model import presets, weights
from model.crossdit import CrossDiT

__all__ = ["DENSE", "AttentionConfig", "CrossDiT", "CrossDiTConfig", "TextCondition", "presets", "weights"]
