"""Activations kept away from their device between forward and backward."""

from k5kernels.offload.activations import ActivationOffload

__all__ = ["ActivationOffload"]
