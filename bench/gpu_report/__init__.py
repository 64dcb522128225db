"""What the Triton kernels become on each GPU architecture: compiled ahead of time, no GPU needed, nothing timed."""
