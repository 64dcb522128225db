"""Activations kept away from their device between forward and backward."""

from k5kernels.offload.activations import ActivationOffload, offload_saved_tensors

__all__ = ["ActivationOffload", "offload_saved_tensors"]
