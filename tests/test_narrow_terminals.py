"""Tables at the width of a usual terminal, 80 columns, and of a wide one, 120."""

from pathlib import Path

import pytest
from command_line import k5

from k5kernels.ops.library import OPERATORS
from k5kernels.planner.stages import stages

SWEEP = Path(__file__).parents[1] / "bench" / "data" / "planner_sweep.csv"
COMMANDS = {
    "info": ["k5::", *OPERATORS],
    "plan step --preset video_lite --resolution 512x768 --seconds 5": ["tokenwise", "9,088.0"],
    "plan memory --preset video_pro --resolution 512x768 --seconds 5 --gpus 64 --offload": ["block activations"],
    "plan inference --preset video_pro --resolution 768x1280 --seconds 10 --nabla-thr 0.7 --magcache": ["resident"],
    "plan inference": ["video_lite Flash", "512×768×121", "+19%"],
    "plan stages": list(stages()),
    "plan search --stage video_pro_hr_10s --gpus 512 --keep 2": ["GPU-hours", "no checkpointing"],
    f"plan calibrate --steps {SWEEP} --name cpu": ["attention"],
}


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_cell_is_cut_and_no_line_is_longer(command, columns):
    result = k5(command, columns=columns)
    assert result.exit_code == 0, result.output
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= columns
    assert all(f" {words} " in result.stdout for words in COMMANDS[command])
