"""Damaged weights end in one line, or load as weights that are finite."""

import random
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from many_cases import tally

from k5kernels.vae import HunyuanDecoder, HunyuanEncoder, VAEConfig
from k5kernels.vae.weights import load_decoder, load_encoder, save_vae
from k5kernels.weight_files import WeightsError
from model import CrossDiT, CrossDiTConfig
from model.weights import load_crossdit, save_crossdit

# What takes the place of a number, a text or a list of the header.
VALUES = ["-1", "0", "1e400", "NaN", "null", "true", "[]", "{}", '""', "1000000000", str(2**64), "[" * 50, r'"\u0000"']
VALUES += [f'"{dtype}"' for dtype in ("F32", "F64", "I8", "F4", "BOOL", "U64", "F8_E8M0", "C64")]
LONGEST_MESSAGE = 700


LOADERS: dict[str, Callable[[Path], torch.nn.Module]] = {
    "crossdit": load_crossdit,
    "encoder": load_encoder,
    "decoder": load_decoder,
}


@dataclass(frozen=True)
class DamagedWeights:
    """files: whole ones, by what loads them."""

    files: dict[str, bytes]

    def __call__(self, case: int, folder: Path) -> str:
        draw = random.Random(case)
        kind = draw.choice(sorted(self.files))
        path = folder / "damaged.safetensors"
        path.write_bytes(mutated(self.files[kind], draw))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model = LOADERS[kind](path)
        except WeightsError as error:
            message = str(error)
            assert message.startswith(str(path)), message
            assert len(message.splitlines()) == 1, message
            assert len(message) < LONGEST_MESSAGE, message
            return "refused in one line"
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "not finite"
        return "loaded"


@pytest.fixture(scope="module")
def damaged_weights(tmp_path_factory: pytest.TempPathFactory) -> DamagedWeights:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    small = {"model_dim": 16, "time_dim": 4, "ff_dim": 8, "in_text_dim": 4, "in_text_dim2": 4}
    save_crossdit(
        folder / "crossdit", CrossDiT(CrossDiTConfig(text_blocks=1, visual_blocks=1, axes_dims=(4, 6, 6), **small))
    )
    vae = VAEConfig(widths=(2, 2, 2, 2), groups=1, layers_per_block=1, latent_channels=1)
    save_vae(folder / "vae", HunyuanEncoder(vae), HunyuanDecoder(vae))
    crossdit, both = (folder / "crossdit").read_bytes(), (folder / "vae").read_bytes()
    return DamagedWeights({"crossdit": crossdit, "encoder": both, "decoder": both})


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One to four bits flipped, the end cut off, bytes appended, or values of the header replaced."""
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        change = generator.choice([flip_anywhere, flip_in_length, flip_in_header, cut, append, *[replace_value] * 5])
        data = change(data, generator)
        if len(data) < 9:
            break
    return data


def flip(data, position, generator):
    return data[:position] + bytes([data[position] ^ (1 << generator.randrange(8))]) + data[position + 1 :]


def flip_anywhere(data, generator):
    return flip(data, generator.randrange(len(data)), generator)


def flip_in_length(data, generator):
    return flip(data, generator.randrange(8), generator)


def flip_in_header(data, generator):
    return flip(data, generator.randrange(8, min(len(data), 8 + header_length(data))), generator)


def cut(data, generator):
    return data[: generator.randrange(len(data))]


def append(data, generator):
    return data + bytes(generator.randrange(1, 100))


def replace_value(data, generator):
    """A value of the config in half of the cases, else of what describes the tensors; the header stays whole."""
    length = header_length(data)
    header = data[8 : 8 + length].decode("latin-1")
    in_config = generator.random() < 0.5
    found = list(re.finditer(r'-?\d+|\\"[^"\\]*\\"' if in_config else r'-?\d+|"[^"]*"|\[[^\]]*\]', header))
    if in_config:
        found = [value for value in found if value.start() < header.find('"format"')] or found
    if not found:
        return data
    chosen, value = generator.choice(found), generator.choice(VALUES)
    if in_config:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    header = header[: chosen.start()] + value + header[chosen.end() :]
    return len(header).to_bytes(8, "little") + header.encode("latin-1") + data[8 + length :]


def header_length(data):
    return max(1, min(int.from_bytes(data[:8], "little"), len(data) - 8))


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_weights(damaged_weights: DamagedWeights, count: int) -> None:
    counts = tally("weights", damaged_weights, range(count))
    assert counts["refused in one line"] > count // 2
    assert counts["loaded"] > 0


def test_undamaged_weights_load(damaged_weights: DamagedWeights, tmp_path: Path) -> None:
    for kind, data in damaged_weights.files.items():
        (tmp_path / kind).write_bytes(data)
        LOADERS[kind](tmp_path / kind)
