"""What a training shows: a row of the log in words, and the rates in it."""

import pytest
import torch
from rich.console import Console
from tiny_stage import TINY, tiny_stage

from k5kernels.planner import ModelShape
from train import progress
from train.measuring import Measuring, measured_peak, step_operations
from train.parallel import ALONE
from train.progress import ProgressLine, row_in_words

ROW = {
    "step": 100,
    "loss": 0.12345,
    "step_ms": 2000.4,
    "predicted_ms": 1900,
    "hardware": "H100",
    "data_ms": 1.2,
    "compute_ms": 1499.2,
    "communication_ms": 500.0,
    "checkpoint_ms": 2.5,
    "tokens_per_s": 12345.6,
    "mfu": 0.314,
    "peak_bytes": 3 * 2**29,
}


def test_a_row_in_words():
    assert row_in_words(ROW, steps=1900) == (
        "loss 0.1235, 2,000 ms a step (predicted 1,900 on H100), data 1 + compute 1,499 + communication 500 + "
        "checkpoint 2, 12,346 tokens/s, MFU 31%, 1.50 GiB, 1.0 h left"
    )
    assert row_in_words({"step": 1, "loss": None, "step_ms": 1}, steps=31) == "no step was taken, 1 ms a step, 0 s left"


@pytest.mark.parametrize(("terminal", "shown"), [(False, True), (True, True), (False, False)])
def test_without_a_terminal_every_row_is_one_line(monkeypatch, capsys, terminal, shown):
    monkeypatch.setattr(
        progress, "console", lambda stderr=False: Console(stderr=stderr, force_terminal=terminal, width=60)
    )
    with ProgressLine(200, 0, shown) as line:
        line.step(100)
        line.row(ROW)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 100 of 200: loss 0.1235")]
    assert len(lines) == (shown and not terminal)


def test_the_rates_are_of_the_work_between_two_rows():
    stage, now = tiny_stage(batch=2), [0.0]
    measuring = Measuring(stage, ALONE, 1e6, {"predicted_ms": 5.0}, clock=lambda: now[0])
    for step in range(3):
        stage.loss(step, torch.Generator().manual_seed(step))
    now[0] = 4.0
    row = measuring({"step_ms": 1000.0, "communication_ms": 300.0})
    tokens = 2 * 2 * 2  # of a latent of 2 x 4 x 4
    assert row["tokens_per_s"] == pytest.approx(3 * 2 * tokens / 4)
    assert row["mfu"] == pytest.approx(3 * step_operations(ModelShape.of(TINY), 2, tokens, 1.0) / 4 / 1e6, abs=1e-4)
    assert row["predicted_ms"] == 5.0
    assert row["data_ms"] > 0
    assert row["data_ms"] + row["compute_ms"] == pytest.approx(700, abs=0.01)
    now[0] = 5.0
    row = measuring({"step_ms": 1000.0, "communication_ms": None})
    assert row["tokens_per_s"] == 0
    assert row["compute_ms"] is None


def test_the_operations_of_a_step_are_those_of_its_products():
    shape = ModelShape(64, 16, 128, 2)
    products = 2 * 10 * (8 * 64**2 + 2 * 128 * 64)
    assert step_operations(shape, 3, 10, 0.5) == 3 * 3 * 2 * (products + 4 * 0.5 * 10**2 * 64)


def test_the_peak_is_no_less_than_what_a_product_reaches_in_practice():
    assert measured_peak(torch.device("cpu"), torch.float32) > 1e9
