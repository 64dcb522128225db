import pytest
import torch

from bench import harness


class RecordingBenchmark:
    """The part of pytest-benchmark's fixture that the harness uses."""

    def __init__(self):
        self.name, self.extra_info, self.timed = "test_case", {}, []

    def pedantic(self, function, rounds, iterations):
        self.timed.append(function)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(harness, "ROUND_SECONDS", 1e-4)
    return harness.ROWS


def check(out):
    torch.testing.assert_close(out, torch.ones(4))


def test_a_wrong_output_is_never_timed(rows):
    benchmark = RecordingBenchmark()
    variants = {"ours": lambda: torch.ones(4), "wrong": lambda: torch.zeros(4)}
    with pytest.raises(AssertionError):
        harness.compare(benchmark, "[4]", variants, check)
    assert not rows
    assert not benchmark.timed


def test_every_variant_gets_a_median_and_a_ratio_to_ours(rows):
    benchmark = RecordingBenchmark()
    variants = {"ours": lambda: torch.ones(4), "other": lambda: torch.ones(4)}
    row = harness.compare(benchmark, "[4]", variants, check)
    assert rows == [row]
    assert [len(times) for times in row.milliseconds.values()] == [harness.ROUNDS] * 2
    assert f"({row.ratios('other')[1]:.2f}x" in str(row)
    assert benchmark.timed == [variants["ours"]]
    assert benchmark.extra_info["median_ms"] == row.medians()


def test_a_ratio_below_its_floor_fails_and_names_both_figures_with_the_row_kept(rows, monkeypatch):
    variants = {"ours": lambda: torch.ones(4), "other": lambda: torch.ones(4)}
    monkeypatch.setattr(harness.Row, "ratios", lambda row, variant: (1.0, 1.25, 9.0))
    for floors in (None, {"other": 1.25}):
        harness.compare(RecordingBenchmark(), "[4]", variants, check, floors=floors)
    with pytest.raises(AssertionError, match=r"case: 1\.25x other, below the floor of 1\.3x"):
        harness.compare(RecordingBenchmark(), "[4]", variants, check, floors={"other": 1.3})
    assert len(rows) == 3


def test_ratios_are_those_of_the_rounds():
    row = harness.Row("case", "[4]", 1, {"ours": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 4.0]})
    assert "1 threads, 3 rounds" in str(row)
    assert row.medians() == {"ours": 2.0, "other": 4.0}
    assert row.ratios("other") == (1.5, 2.0, 2.5)


def test_operations_turn_ratios_of_times_into_ratios_of_rates():
    times, operations = {"ours": [1.0, 1.0, 1.0], "other": [4.0, 4.0, 4.0]}, {"ours": 1e6, "other": 8e6}
    row = harness.Row("case", "[4]", 1, times, operations)
    assert row.ratios("other") == (0.5, 0.5, 0.5)
    assert "other 4.000 ms 2 GFLOP/s (0.50x" in str(row)


def test_bytes_moved_bring_a_copy_of_as_many_bytes_which_floors_may_name(rows):
    row = harness.compare(
        RecordingBenchmark(), "[4]", {"ours": lambda: torch.ones(4)}, check, bytes_moved=32, floors={harness.COPY: 0.0}
    )
    assert list(row.milliseconds) == ["ours", harness.COPY]
    target = harness.copy_of(4096)()
    assert target.nbytes == 4096 // 2
    assert target.eq(1).all()


def test_a_row_with_bytes_moved_says_them_and_the_bandwidth_of_ours_and_of_the_copy():
    times = {"ours": [2.0] * 3, "other": [8.0] * 3, harness.COPY: [1.0] * 3}
    row = str(harness.Row("case", "[4]", 1, times, bytes_moved=6_000_000))
    assert "[4]  6 MB moved" in row
    assert "ours 2.000 ms 3.0 GB/s" in row
    assert "other 8.000 ms (4.00x" in row
    assert "copy 1.000 ms 6.0 GB/s (0.50x" in row


def test_checked_calls_are_the_first_round_where_all_take_long(rows, monkeypatch):
    monkeypatch.setattr(harness, "LONG_SECONDS", 0.0)
    made = []
    variants = {name: lambda name=name: made.append(name) or torch.ones(4) for name in ("ours", "other")}
    row = harness.keep(harness.measure("case", "[4]", variants, check, rounds=3))
    assert rows == [row]
    assert [len(times) for times in row.milliseconds.values()] == [3, 3]
    assert made == ["ours", "other"] * 3


def test_variants_take_turns(rows):
    order = []
    variants = {name: lambda name=name: order.append(name) or torch.ones(4) for name in ("ours", "other")}
    harness.compare(RecordingBenchmark(), "[4]", variants, check)
    turns = [name for name, before in zip(order[1:], order, strict=False) if name != before]
    assert len(turns) >= 2 * harness.ROUNDS
