"""The planner: what a training step takes in time and memory, by the report's formulas (§7.3)."""

from k5kernels.planner.memory import Memory, memory_bytes, memory_terms
from k5kernels.planner.profile import H100, HardwareProfile, load_profile, save_profile
from k5kernels.planner.shapes import MODELS, ClipShape, ModelShape, frames_for, model_shape, parameters
from k5kernels.planner.step import StepTime, step_time_ms, step_time_terms

__all__ = [
    "H100",
    "MODELS",
    "ClipShape",
    "HardwareProfile",
    "Memory",
    "ModelShape",
    "StepTime",
    "frames_for",
    "load_profile",
    "memory_bytes",
    "memory_terms",
    "model_shape",
    "parameters",
    "save_profile",
    "step_time_ms",
    "step_time_terms",
]
