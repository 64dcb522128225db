"""Trainings of CrossDiT and of the VAE, and what is made of their weights."""

import os

from k5_command import stop_imports_in_one_line

stop_imports_in_one_line("train")
# PyTorch's profiler, which `train.communication` starts now and then, says so on stderr each time, in the middle of the
# progress line. It reads this when it is loaded, so it is set before anything here imports torch.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
