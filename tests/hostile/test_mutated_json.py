"""JSON that users give to commands, and that the library keeps: sound values are taken, others refused in one line."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from latent_samples import sample
from many_cases import refusal, tally
from mutations import mutate_json
from safetensors.torch import save_file

from k5kernels.latents.record import from_json, to_json
from k5kernels.planner import H100, load_profile
from k5kernels.weight_files import CONFIG
from model.presets import PRESETS
from model.weights import config_to_json, read_crossdit_config
from train.log import Log
from train.run import read_captions


def use_profile(path: Path) -> None:
    profile = load_profile(path)
    assert math.isfinite(profile.speed)
    assert all(math.isfinite(value) for value in asdict(profile).values() if not isinstance(value, str))


def use_captions(path: Path) -> None:
    assert all(isinstance(text, str) for pair in read_captions(path).items() for text in pair)


def use_record(path: Path) -> None:
    try:
        record = from_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    assert from_json(to_json(record)) == record


def use_log(path: Path) -> None:
    log = Log(path)
    log.keep_until(2)
    assert all(row["step"] <= 2 for row in log.rows())
    log.append({"step": 3, "loss": 1.0})
    assert log.rows()[-1]["step"] == 3


def use_config(path: Path) -> None:
    save_file({"weight": torch.zeros(1)}, path.with_name("diffusion_pytorch_model.safetensors"))
    read_crossdit_config(path.parent)


ROWS = [{"step": step, "loss": 0.5, "step_ms": 3.5, "profile": "H100"} for step in (1, 2, 3)]
KINDS: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "profile": ("profile.json", json.dumps(asdict(H100)), use_profile),
    "captions": ("captions.json", json.dumps({"a.mp4": "A cat.", "b/c": "Zwei Vögel.", "d": ""}), use_captions),
    "record": ("record.json", to_json(sample("a.mp4", (2, 2, 4)).record), use_record),
    "log": ("log.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS), use_log),
    "config": (CONFIG, json.dumps(config_to_json(PRESETS["nano"]) | {"_class_name": "CrossDiT"}), use_config),
}


@dataclass(frozen=True)
class DamagedJSON:
    kind: str

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        name, text, use = KINDS[self.kind]
        path = folder / name
        if self.kind == "log":
            lines = text.encode().splitlines(keepends=True)
            number = draw.randrange(len(lines))
            lines[number] = mutate_json(lines[number], draw)
            path.write_bytes(b"".join(lines))
        else:
            path.write_bytes(mutate_json(text.encode(), draw))
        named = folder if self.kind == "config" else path
        return "taken" if refusal(lambda: use(path), str(named)) is None else "refused in one line"


@pytest.mark.parametrize("count", [40, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_json(kind: str, count: int) -> None:
    counts = tally(kind, DamagedJSON(kind), range(count))
    assert counts["taken"] > 0
    assert counts["refused in one line"] > 0 or kind == "log"
