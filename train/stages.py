"""Stages of training by name: those of the report's Table 4, and three of the nano model for a CPU."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from k5kernels.planner.checks import one_of
from k5kernels.planner.stages import table_4
from train.settings import read_values

# Each starts from the weights of the one before it (§6.2, Figure 18).
AFTER = {
    "image_lite_mr": "image_lite_lr",
    "image_lite_hr": "image_lite_mr",
    "image_editing_mr": "image_lite_mr",
    "image_editing_hr": "image_editing_mr",
    "video_lite_lr": "video_lite_t2i_lr",
    "video_lite_mr_5s": "video_lite_lr",
    "video_lite_mr_10s": "video_lite_mr_5s",
    "video_pro_lr": "video_pro_t2i_lr",
    "video_pro_mr": "video_pro_lr",
    "video_pro_hr_5s": "video_pro_mr",
    "video_pro_hr_10s": "video_pro_hr_5s",
}
FILES = (".json", ".toml")


def stage_values(name: str) -> tuple[dict[str, Any], str]:
    """(the settings of a stage, where they come from); name: of a stage, or a file's (.json, .toml).

    Raises ValueError where there is no stage of that name, and as `read_values`.
    """
    if name.endswith(FILES):
        return read_values(Path(name)), name
    if name in table_4():
        return _released(name), name
    nano = _nano()
    try:
        return nano[one_of("stage", name, {**nano, **table_4()})], name
    except ValueError as error:
        raise ValueError(f"{error}; or the name of a file that ends in {' or '.join(FILES)}") from None


def _nano() -> dict[str, dict[str, Any]]:
    return json.loads(files("train").joinpath("nano_stages.json").read_text())


def _released(name: str) -> dict[str, Any]:
    row = dict(table_4()[name])
    return {
        "name": name,
        "after": AFTER.get(name),
        "preset": row.pop("model"),
        "bf16": True,
        **row,
    }
