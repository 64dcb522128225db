"""The GPU kernels, one file an operator, each imported when its operator first runs on CUDA."""
