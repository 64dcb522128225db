"""`k5 plan`: what its commands print, write and refuse."""

import csv
import json
import re
from pathlib import Path

import pytest
from command_line import fails, k5

from k5kernels import planner
from k5kernels.planner import H100, HardwareProfile, load_profile, save_profile
from k5kernels.planner.calibration import fit, read_steps
from k5kernels.planner.cli.answer import SCHEMA
from k5kernels.planner.stages import stages

SWEEP = Path(__file__).parents[2] / "bench" / "data" / "planner_sweep.csv"
DOCS = Path(__file__).parents[2] / "docs" / "planner.md"
LAYOUT = "--preset video_pro --resolution 512x768 --seconds 5 --shards 64 --replicas 2 --sp 8"
COMMANDS = {
    "step": f"step {LAYOUT} --nabla-thr 0.9",
    "step, plain": "step --preset video_lite --pixels 3047424",
    "memory": f"memory {LAYOUT} --offload --accumulation 2",
    "memory, plain": "memory --preset video_lite --tokens 93696 --gpus 64",
    "search": "search --stage video_lite_mr_5s --gpus 64 --keep 3",
    "stages": "stages --preset video_pro --gpus 512",
    "inference": "inference --preset video_pro --resolution 768x1280 --seconds 10 --nabla-thr 0.7 --magcache",
    "inference, Table 5": "inference",
    "calibrate": f"calibrate --steps {SWEEP}",
}


def answer(command: str) -> dict:
    """What `k5 plan … --json` says."""
    result = k5(f"plan {command} --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_plan_step_shows_the_terms_and_the_total():
    result = k5("plan step --preset video_lite --pixels 3047424")
    assert result.exit_code == 0
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if "│" in line]
    assert [(row[0], next(word for word in row if word.endswith(".0"))) for row in rows] == [
        ("tokenwise", "288.0"),
        ("attention", "448.0"),
        ("linear", "192.0"),
        ("total", "928.0"),
    ]


def test_plan_step_as_json_is_the_planners_answer():
    result = k5("plan step --preset video_pro --resolution 512x768 --seconds 10 --batch 2 --json")
    answer = json.loads(result.stdout)
    assert answer["inputs"] == {
        "model_dim": 4096, "blocks": 60, "pixels": 512 * 768 * 61, "batch": 2, "profile": "H100"
    }  # fmt: skip
    assert answer["total_ms"] == planner.step_time_ms(4096, 512 * 768 * 61, 60, 2)
    assert sum(answer["terms"].values()) == answer["total_ms"]


def test_plan_step_by_numbers_is_the_preset_of_those_numbers():
    by_numbers = k5("plan step --model-dim 1792 --blocks 32 --resolution 512x768 --frames 121 --json")
    by_preset = k5("plan step --preset video_lite --resolution 512x768 --seconds 5 --json")
    assert json.loads(by_numbers.stdout) == json.loads(by_preset.stdout)


def test_a_number_changes_the_preset():
    changed = json.loads(k5("plan step --preset video_lite --blocks 64 --pixels 1000000 --json").stdout)
    assert changed["inputs"]["blocks"] == 64
    assert changed["inputs"]["model_dim"] == 1792


def test_plan_memory_shows_the_terms_in_gib():
    result = k5("plan memory --preset video_lite --tokens 93696 --gpus 64")
    assert result.exit_code == 0
    assert {"0.33", "0.11", "10.01", "8.13", "18.47"} <= set(result.stdout.split())


def test_plan_memory_as_json_is_the_planners_answer():
    result = k5("plan memory --preset video_lite --resolution 512x768 --seconds 10 --batch 2 --gpus 64 --json")
    answer = json.loads(result.stdout)
    assert answer["inputs"]["tokens"] == 2 * 93_696
    assert answer["inputs"]["parameters"] == planner.parameters(1792, 512, 7168, 32)
    assert answer["total_bytes"] == planner.memory_bytes(1792, 512, 7168, 32, 2 * 93_696, 64, offload=False)
    assert (
        answer["terms"]["block_inputs_bytes"] + answer["terms"]["block_activations_bytes"]
        == (answer["activations_bytes"])
    )


def test_plan_memory_offload_drops_the_block_inputs():
    answer = json.loads(k5("plan memory --preset video_lite --tokens 93696 --offload --json").stdout)
    assert answer["inputs"]["offload"] is True
    assert answer["terms"]["block_inputs_bytes"] == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan step --blocks 32 --pixels 1000", ["--model-dim", "--preset"]),
        ("plan memory --model-dim 64 --tokens 64", ["--time-dim", "--ff-dim", "--blocks"]),
        ("plan step --preset video_lite", ["--resolution", "--frames", "--seconds", "--pixels"]),
        ("plan step --preset video_lite --resolution 512x768", ["--frames", "--seconds"]),
        ("plan step --preset video_lite --resolution 512x768 --frames 5 --seconds 1", ["either", "--frames"]),
        ("plan step --preset video_lite --pixels 1000 --frames 5", ["--pixels", "alone"]),
        ("plan step --preset video_lite --resolution 512 --frames 5", ["HEIGHTxWIDTH", "'512'"]),
        ("plan step --preset video_lite --pixels 0", ["--pixels", "1"]),
        ("plan memory --preset video_lite --tokens 64 --gpus none", ["--gpus", "integer"]),
    ],
)
def test_a_wrong_command_line_says_what_to_give_and_exits_with_2(command, words):
    fails(command, 2, *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan step --preset lite --pixels 1000", ["preset: expected one of", "video_pro", "'lite'"]),
        ("plan step --preset video_lite --resolution 500x768 --frames 121", ["height", "multiple of 16", "500"]),
        ("plan step --preset video_lite --resolution 512x768 --frames 120", ["frames", "multiple of 4", "120"]),
        ("plan step --preset video_lite --resolution 512x768 --seconds nan", ["seconds", "above 0", "nan"]),
        (f"plan memory --preset video_lite --tokens {10**30}", ["tokens", "2**63", str(10**30)]),
    ],
)
def test_a_value_that_cannot_be_is_one_line_on_stderr_and_exits_with_1(command, words):
    fails(command, 1, *words)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_key_of_the_json_is_in_the_documented_schema(command):
    documented = set(re.findall(r"`(\w+)`", DOCS.read_text()))

    def keys(value) -> set[str]:
        if isinstance(value, dict):
            # The names of the stages' models and of the dropped rules are values that stand as keys.
            named = {key for key in value if re.fullmatch(r"\w+", key) and key not in planner.MODELS}
            return named.union(*(keys(each) for each in value.values()))
        return set().union(*(keys(each) for each in value)) if isinstance(value, list) else set()

    found = answer(command)
    assert found["schema"] == SCHEMA
    assert found["command"] == command.split()[0]
    assert keys(found) <= documented


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_csv_has_a_row_of_figures_with_units_in_their_names(command, tmp_path):
    assert k5(f"plan {command} --csv {tmp_path}/figures.csv").exit_code == 0
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    units = ("_ms", "_bytes", "_hours", "_s", "days")
    assert any(name.endswith(units) and float(value) > 0 for name, value in rows[0].items() if value)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_the_table_is_for_people(command):
    result = k5(f"plan {command}")
    assert result.exit_code == 0
    assert "┃" in result.stdout
    assert re.search(r"\b(ms|s|GiB|GB|\[s\]|\[ms\])", result.stdout)


@pytest.mark.parametrize("name", ["step", "step, plain", "memory", "memory, plain", "search"])
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_a_picture_of_the_kind_its_name_says(name, suffix, tmp_path):
    picture = tmp_path / f"plot{suffix}"
    result = k5(f"plan {COMMANDS[name]} --plot {picture}")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_a_plot_of_another_kind_is_refused():
    fails("plan step --preset video_lite --pixels 1000 --plot plot.txt", 1, "plot", ".png or .svg", "plot.txt")


def test_the_terms_of_a_layout_add_up_to_its_step():
    found = answer(COMMANDS["step"])
    assert sum(found["terms"].values()) == pytest.approx(found["total_ms"])
    assert found["inputs"]["gpus"] == 128
    assert found["terms"]["nabla_ms"] < 0 < found["terms"]["sequence_collectives_ms"]


def test_a_layout_by_numbers_is_the_presets():
    sizes = "--model-dim 1792 --time-dim 512 --ff-dim 7168 --blocks 32"
    rest = "--resolution 512x768 --frames 121 --shards 8 --sp 4"
    for command in ("step", "memory"):
        assert answer(f"{command} {sizes} {rest}") == answer(f"{command} --preset video_lite {rest}")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--shards 5 --sp 5", ["layout", "SP 5 does not divide 28 heads"]),
        ("--shards 16 --sp 14", ["layout", "SP 14", "node of 8"]),
        ("--shards 12", ["layout", "12 GPUs are not whole nodes of 8"]),
        ("--shards 8 --offload --no-checkpointing", ["offload", "without checkpointing"]),
    ],
)
def test_a_layout_that_cannot_be_is_refused(options, words):
    for command in ("step", "memory"):
        fails(f"plan {command} --preset video_lite --resolution 512x768 --seconds 5 {options}", 1, *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan step --preset video_lite --pixels 1000 --sp 2", ["--sp", "--shards"]),
        ("plan step --preset video_lite --pixels 1000 --shards 8", ["--pixels", "--resolution"]),
        ("plan memory --preset video_lite --tokens 64 --accumulation 2", ["--accumulation", "--shards"]),
        ("plan memory --preset video_lite --tokens 64 --shards 8", ["--tokens", "clip"]),
        ("plan search --gpus 8", ["--stage", "--mix"]),
        ("plan search --gpus 8 --stage video_pro_mr --preset video_lite", ["--stage", "--preset"]),
        ("plan search --gpus 8 --mix 512x768:half --preset video_lite --batch 8 --frames 5", ["--mix", "half"]),
        ("plan inference --preset video_lite", ["--resolution"]),
        ("plan calibrate", ["--steps", "--sweep"]),
        (f"plan calibrate --sweep --steps {SWEEP}", ["--steps", "--sweep"]),
    ],
)
def test_options_that_do_not_go_together_are_told(command, words):
    fails(command, 2, *words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan search --gpus 8 --stage video_lite_xl", ["stage: expected one of", "video_lite_lr", "'video_lite_xl'"]),
        ("plan search --gpus 8 --stage video_pro_mr --goal speed", ["goal", "wall-time", "'speed'"]),
        ("plan search --gpus 8 --stage video_pro_mr --memory 4", ["no layout is possible on 8 GPUs", "GiB"]),
        ("plan search --gpus 8 --stage video_pro_mr --tolerance 2", ["batch_tolerance", "2"]),
        ("plan search --gpus 8 --stage video_pro_mr --nabla-thr 1.5", ["nabla_thr", "1.5"]),
        ("plan search --gpus 8 --stage video_pro_mr --optimizer-dtype int4", ["optimizer_dtype", "'int4'"]),
        ("plan stages --preset video_max", ["model: expected one of", "video_pro", "'video_max'"]),
        ("plan inference --preset video_pro --resolution 500x768 --seconds 5", ["height", "16", "500"]),
        ("plan step --preset video_lite --pixels 1000 --profile missing.json", ["missing.json"]),
    ],
)
def test_a_field_that_cannot_be_says_what_was_given_and_what_is_allowed(command, words):
    fails(command, 1, *words)


def test_search_says_why_the_best_is_best_and_why_the_others_lose():
    found = answer(COMMANDS["search"])
    assert [plan["rank"] for plan in found["ranked"]] == [1, 2, 3]
    assert "GiB" in found["why_best"]
    for other in found["alternatives"]:
        assert other["layout"] != {name: found["ranked"][0][name] for name in other["layout"]}
        assert other["verdict"].startswith(("fits: ", "does not fit: ", "cannot be: "))
    assert len(found["alternatives"]) > 3
    assert found["possible"] + sum(found["dropped"].values()) == found["candidates"]


def test_search_takes_a_mix_of_sizes():
    mix = "--mix 512x768:0.5 --mix 768x512:0.5"
    found = answer(f"search --gpus 8 --preset video_lite {mix} --seconds 5 --batch 16 --goal gpus")
    assert found["ranked"][0]["batch"] == 16


def test_stages_shows_the_whole_of_table_4_and_the_totals():
    found = answer("stages")
    assert [row["stage"] for row in found["stages"]] == list(stages())
    for model, total in found["totals"].items():
        hours = [row["gpu_hours"] for row in found["stages"] if row["model"] == model]
        assert total["gpu_hours"] == pytest.approx(sum(hours))


@pytest.fixture
def half_as_fast(tmp_path) -> Path:
    path = tmp_path / "slow.json"
    save_profile(HardwareProfile("slow", tokenwise_ms=18, attention_ms=28, linear_ms=12), path)
    return path


@pytest.mark.parametrize(
    ("command", "time"),
    [
        (COMMANDS["step, plain"], lambda found: found["total_ms"]),
        (COMMANDS["step"], lambda found: found["terms"]["attention_ms"]),
        ("stages", lambda found: found["totals"]["video_pro"]["gpu_hours"]),
        (COMMANDS["inference"], lambda found: found["time"]["attention_s"] + found["time"]["linear_s"]),
    ],
    ids=["step, plain", "step", "stages", "inference"],
)
def test_a_profile_half_as_fast_takes_twice_the_time(command, time, half_as_fast):
    assert time(answer(f"{command} --profile {half_as_fast}")) == pytest.approx(2 * time(answer(command)))


def test_search_and_memory_take_a_profile(half_as_fast):
    search = COMMANDS["search"]
    slow, fast = answer(f"{search} --profile {half_as_fast}"), answer(search)
    assert slow["inputs"]["profile"] == "slow"
    assert slow["ranked"][0]["gpu_hours"] > 1.5 * fast["ranked"][0]["gpu_hours"]
    assert answer(f"{COMMANDS['memory']} --profile {half_as_fast}")["inputs"]["profile"] == "slow"


def test_calibrate_saves_a_profile_and_steps_that_load(tmp_path):
    result = k5(f"plan calibrate --steps {SWEEP} --save {tmp_path}/cpu.json --name cpu --csv {tmp_path}/fitted.csv")
    assert result.exit_code == 0, result.output
    assert load_profile(tmp_path / "cpu.json") == fit(read_steps(SWEEP), "cpu")
    assert read_steps(tmp_path / "fitted.csv") == read_steps(SWEEP)
    assert "mean error" in result.stdout


def test_the_reports_h100_is_the_default():
    assert answer("stages")["inputs"]["profile"] == H100.name == "H100"
