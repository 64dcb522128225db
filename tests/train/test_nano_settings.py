"""Figures are written block by block, and nothing else in the file is touched."""

import json

from train.nano_settings import record


def test_blocks_and_entries_that_are_not_named_stay(tmp_path):
    path = tmp_path / "settings.json"
    record(path, {"vae": {"seed": 0, "first": {"steps": 3}}, "rows": [1, 2]})
    record(path, {"vae": {"last": {"steps": 5}, "seed": 1}, "rows": [3]})
    assert json.loads(path.read_text()) == {
        "vae": {"seed": 1, "first": {"steps": 3}, "last": {"steps": 5}},
        "rows": [3],
    }
