"""Activations in host memory between forward and backward."""

from k5kernels.offload.activations import offload_saved_tensors

__all__ = ["offload_saved_tensors"]
