"""The planner: what a training step takes in time and memory, by the report's formulas (§7.3)."""

from k5kernels.planner.memory import Memory, memory_bytes, memory_terms, parameters
from k5kernels.planner.shapes import MODELS, ClipShape, ModelShape, frames_for, model_shape
from k5kernels.planner.step import StepTime, step_time_ms, step_time_terms

__all__ = [
    "MODELS",
    "ClipShape",
    "Memory",
    "ModelShape",
    "StepTime",
    "frames_for",
    "memory_bytes",
    "memory_terms",
    "model_shape",
    "parameters",
    "step_time_ms",
    "step_time_terms",
]
