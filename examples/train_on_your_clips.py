"""Fine-tune the nano model on shards that `k5 encode` made, with NABLA attention.

    python examples/train_on_your_clips.py latents --out runs/mine --steps 200

`python -m train.run` is this with the planner's predictions and all options. The same command goes on from the folder's
checkpoint.
"""

import argparse
from pathlib import Path

import torch

from k5kernels.attention import AttentionConfig
from k5kernels.text_encoders import MiniLMTextEncoder
from model.nano import CROSSDIT_WEIGHTS, load_settings
from model.weights import load_crossdit
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.latents import LatentSet, read_shards
from train.loop import Loop
from train.run import save_averaged
from train.schedule import Schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", type=Path, help="folder of shards (*.tar)")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    torch.manual_seed(0)
    settings = load_settings()
    data = LatentSet(read_shards(options.latents), captions={})
    model = load_crossdit(CROSSDIT_WEIGHTS)
    model.gradient_checkpointing = True
    config = FlowMatching(attention=AttentionConfig("nabla", settings.thr, settings.sta))
    stage = CrossDiTStage(model, data, MiniLMTextEncoder().encode, config)
    Loop(stage, Schedule(options.steps, warmup_steps=10)).run(options.out, every=50)
    save_averaged(stage, options.out)


if __name__ == "__main__":
    main()
