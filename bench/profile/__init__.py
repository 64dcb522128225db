"""Where the time of a step goes: `python -m bench.profile`."""
