"""Checks and measures the library on a GPU, on a machine with torch, triton, numpy and pytest and no network."""
