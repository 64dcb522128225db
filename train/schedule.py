"""Learning-rate schedule shared by the trainings."""


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last `decay_steps` of `steps`."""
    up = (step + 1) / warmup_steps if warmup_steps else 1.0
    down = (steps - step) / decay_steps if decay_steps else 1.0
    return peak * min(up, 1.0, down)
