"""Our attention in a diffusers pipeline: `with accelerate(pipe, attention="nabla") as report: pipe(...)`."""

from k5kernels.integrations.diffusers.accelerate import Acceleration, accelerate
from k5kernels.integrations.diffusers.models import UnsupportedModelError
from k5kernels.integrations.diffusers.report import Report

__all__ = ["Acceleration", "Report", "UnsupportedModelError", "accelerate"]
