"""`python -m k5kernels` is `k5`."""

from k5kernels.cli import app

app(prog_name="k5")
