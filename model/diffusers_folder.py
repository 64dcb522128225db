"""A CrossDiT as the transformer folder of a diffusers pipeline, to run there what was trained here.

    python -m model.diffusers_folder OUT

writes the nano model; any other by `export_transformer`.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from k5_command import stop_in_one_line
from model.crossdit import CrossDiT
from model.nano import CROSSDIT_WEIGHTS
from model.weights import config_to_json, load_crossdit

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
CLASS = "Kandinsky5Transformer3DModel"


def export_transformer(model: CrossDiT, folder: Path) -> None:
    """Writes what `Kandinsky5Transformer3DModel.from_pretrained(folder)` loads: config.json and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"_class_name": CLASS, "attention_type": "regular"} | config_to_json(model.config)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def main() -> None:
    """Exports the nano model."""
    if len(sys.argv) != 2:
        sys.exit("model.diffusers_folder: expected one folder to write the nano model to")
    export_transformer(load_crossdit(CROSSDIT_WEIGHTS), Path(sys.argv[1]))


if __name__ == "__main__":
    stop_in_one_line("model.diffusers_folder")
    main()
