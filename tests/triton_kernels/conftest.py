"""The kernels of k5kernels/triton, interpreted on the CPU: `TRITON_INTERPRET=1 pytest tests/triton_kernels`."""

import interpreter_bf16

interpreter_bf16.install()
