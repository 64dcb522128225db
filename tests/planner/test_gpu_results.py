"""A results file of a GPU gives a profile whose attention is the measured one, or is refused in words."""

import json
from pathlib import Path

import pytest
from command_line import fails, k5

from k5kernels.planner import H100, load_profile
from k5kernels.planner.gpu_results import profile_of_results

H200 = Path(__file__).parents[2] / "bench" / "results" / "h200-2026-11-26.json"
ROW = {"sizes": "Lite 10 s (61, 32, 48), 28 × 64", "variant": "dense", "unit": "TFLOP/s", "median": 100.0}


def results(tmp_path, *rows):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"machine": {"card": "A card"}, "sections": {}, "rows": rows}))
    return path


def test_attention_of_the_h200_is_a_forward_its_repetition_and_a_backward_at_the_measured_rates():
    profile = profile_of_results(H200)
    work = 4 * 11_904**2 * 1792  # tokens of S0, and d0
    assert profile.name == "NVIDIA H200"
    assert profile.attention_ms == pytest.approx(1e3 * (work / 464e12 + 3.5 * work / 459e12))
    assert profile.attention_ms < H100.attention_ms
    assert (profile.tokenwise_ms, profile.linear_ms) == (H100.tokenwise_ms, H100.linear_ms)


def test_of_several_dense_variants_the_best_counts_and_no_sparse_one(tmp_path):
    rates = [{**ROW, "section": section} for section in ("attention", "backward")]
    slower = {**rates[0], "variant": "dense, another", "median": 50.0}
    sparse = {**rates[0], "variant": "k5", "median": 900.0}
    wide = {**rates[0], "sizes": "Pro 5 s HD (31, 48, 80), 32 × 128", "median": 900.0}
    path = results(tmp_path, slower, *rates, sparse, wide)
    assert profile_of_results(path).attention_ms == pytest.approx(4.5 * 4 * 11_904**2 * 1792 / 100e9)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "results file"),
        ("[1]", "results file"),
        ('{"machine": {"card": "x"}, "rows": [1]}', "results file"),
        ('{"machine": {"card": "x"}, "rows": []}', "no TFLOP/s of dense attention"),
        (json.dumps({"machine": {"card": "x"}, "rows": [{**ROW, "section": "attention", "median": -1}]}), "median"),
    ],
)
def test_a_file_that_says_nothing_of_dense_attention_is_refused(text, words, tmp_path):
    path = tmp_path / "card.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        profile_of_results(path)
    assert str(path) in str(refused.value)


def test_the_command_saves_the_profile_and_says_which_terms_are_the_reports(tmp_path):
    done = k5(f"plan calibrate --from-results {H200} --save {tmp_path}/h200.json")
    assert done.exit_code == 0, done.output
    assert load_profile(tmp_path / "h200.json") == profile_of_results(H200)
    assert "the report's" in done.stdout
    found = json.loads(k5(f"plan calibrate --from-results {H200} --json").stdout)
    assert found["inputs"]["source"] == str(H200)
    fails(f"plan calibrate --from-results {tmp_path}/none.json", 1, "none.json")
    fails(f"plan calibrate --from-results {H200} --sweep", 2, "--from-results")
