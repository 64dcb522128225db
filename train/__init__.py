"""Trainings of CrossDiT and of the VAE, and what is made of their weights."""

from k5_command import stop_imports_in_one_line

stop_imports_in_one_line("train")
