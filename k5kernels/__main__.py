"""`python -m k5kernels` is `k5`."""

from k5kernels.cli import main

main()
