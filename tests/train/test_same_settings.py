"""With other settings than a checkpoint's a run goes on only where it is told to, and never as another model."""

import pytest

from train.checkpoint import CheckpointError
from train.same_settings import refuse_others


def test_other_settings_are_named_each(tmp_path):
    stored = {"seed": 0, "batch": 1, "attention": {"kind": "dense", "thr": 0.9}, "model": {"blocks": 2}}
    given = stored | {"seed": 5, "attention": {"kind": "nabla", "thr": 0.9}, "new": True}
    with pytest.raises(CheckpointError) as refused:
        refuse_others(tmp_path, stored, given, allow_others=False)
    message = str(refused.value)
    assert 'seed 0 (now 5), attention.kind "dense" (now "nabla"), new not set (now true);' in message
    assert "--set-on-resume" in message
    refuse_others(tmp_path, stored, given, allow_others=True)
    refuse_others(tmp_path, stored, stored, allow_others=False)
    refuse_others(tmp_path, stored, {"seed": 0}, allow_others=False)


@pytest.mark.parametrize("change", [{"model": {"blocks": 3}}, {"init": "sha256 0"}, {"stage": "vae"}])
def test_another_model_is_refused_even_so(tmp_path, change):
    stored = {"seed": 0, "model": {"blocks": 2}, "init": None, "stage": "crossdit"}
    with pytest.raises(CheckpointError, match="train into another folder") as refused:
        refuse_others(tmp_path, stored, stored | change | {"seed": 1}, allow_others=True)
    assert "seed" not in str(refused.value)
