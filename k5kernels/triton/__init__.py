"""The GPU kernels, a file for each operator, imported when the operator first runs on CUDA."""
