"""The options of `train.run`, in the groups that its --help shows."""

from pathlib import Path
from typing import Annotated, Any

import typer

from k5kernels.terminal import DeviceName

_STAGE, _DATA, _RUN = "The stage", "Data and where from", "This run"
_MEMORY, _PROCESSES, _PLAN = "Memory", "Processes", "Before a run"


def _option(panel: str, words: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=words, rich_help_panel=panel, **more)


StageName = Annotated[str | None, _option(_STAGE, "a stage by name (train/stages.py), or its file (.json, .toml)")]
Steps = Annotated[int | None, _option(_STAGE, "steps of the whole schedule; needed without a stage")]
Preset = Annotated[str | None, _option(_STAGE, "sizes of the model; nano alone fits this trainer's text encoder")]
ModelDim = Annotated[int | None, _option(_STAGE, "width instead of the preset's, MLP 4 times as wide", min=1)]
Blocks = Annotated[int | None, _option(_STAGE, "CrossDiT blocks instead of the preset's", min=1)]
Batch = Annotated[int | None, _option(_STAGE, "samples in a step on clips, of all processes together")]
ImageBatch = Annotated[int | None, _option(_STAGE, "samples in a step on images; as many without")]
LatentFrames = Annotated[int | None, _option(_STAGE, "keep the first so many latent frames", min=1)]
LearningRate = Annotated[float | None, _option(_STAGE, "AdamW's learning rate after the warm-up")]
WeightDecay = Annotated[float | None, _option(_STAGE, "of matrices; norms, biases, embeddings have none")]
WarmupSteps = Annotated[int | None, _option(_STAGE, "steps over which the learning rate rises")]
DecaySteps = Annotated[int | None, _option(_STAGE, "last steps, over which it falls to zero")]
EmaDecay = Annotated[float | None, _option(_STAGE, "of the running average of the weights")]
NablaThr = Annotated[float | None, _option(_STAGE, "NABLA attention at this threshold; dense without")]
NablaWindow = Annotated[
    bool | None, _option(_STAGE, "unite its mask with the 11×3×3 window", "--nabla-window/--no-nabla-window")
]
Bf16 = Annotated[
    bool | None, _option(_STAGE, "compute in bfloat16 (autocast); weights stay float32", "--bf16/--no-bf16")
]
Seed = Annotated[int | None, _option(_STAGE, "of the random weights and of every draw")]

Latents = Annotated[Path | None, _option(_DATA, "folder of latent shards (*.tar)")]
Init = Annotated[
    Path | None,
    _option(_DATA, "start from these weights, or those of a run's folder, ended or not, not from random ones"),
]
Captions = Annotated[Path | None, _option(_DATA, "JSON, JSONL or CSV, by video; before those in the shards")]
NoCaptions = Annotated[bool, _option(_DATA, "train on the empty prompt", "--no-captions")]

Out = Annotated[Path | None, _option(_RUN, "folder for the log, the checkpoints and the weights")]
Every = Annotated[int, _option(_RUN, "steps between log rows and checkpoints", min=1)]
Keep = Annotated[int, _option(_RUN, "checkpoints that stay, the newest", min=1)]
NonfiniteLimit = Annotated[
    int, _option(_RUN, "steps in a row without a finite loss and gradients that end the training", min=1)
]
SetOnResume = Annotated[bool, _option(_RUN, "go on from a checkpoint of other settings with these", "--set-on-resume")]
Vae = Annotated[
    Path | None, _option(_RUN, "weights of the latents' VAE: draw what the model makes of a caption, with its decoder")
]
Samples = Annotated[int | None, _option(_RUN, "how often --vae draws, evenly over the steps; 4 times without", min=1)]
ProfileSteps = Annotated[
    int, _option(_RUN, "trace so many steps, by operators and ranges, into trace.json", "--profile", min=0)
]

Checkpointing = Annotated[
    bool | None, _option(_MEMORY, "recompute each block in the backward", "--checkpointing/--no-checkpointing")
]
Offload = Annotated[
    bool | None, _option(_MEMORY, "keep block inputs away until the backward needs them", "--offload/--no-offload")
]
OffloadFolder = Annotated[Path | None, _option(_MEMORY, "on a CPU, where to; a folder in that of the run without")]
OffloadGib = Annotated[float, _option(_MEMORY, "keep away at most so many GiB", min=0)]

Replicate = Annotated[int, _option(_PROCESSES, "copies of the sharded weights among the processes", min=1)]
Shard = Annotated[int | None, _option(_PROCESSES, "data ranks of a copy; without it what the other two leave", min=1)]
Sequence = Annotated[int, _option(_PROCESSES, "processes that share the tokens of each sample", min=1)]
Device = DeviceName

PrintStage = Annotated[
    bool, _option(_PLAN, "print the stage's settings as a file to edit, and train nothing", "--print-stage")
]
DryRun = Annotated[bool, _option(_PLAN, "print the predicted time and memory, and refuse what cannot fit", "--dry-run")]
Hardware = Annotated[
    Path | None, _option(_PLAN, "hardware profile of the predictions, by k5 plan calibrate; H100 without")
]
Gpus = Annotated[int, _option(_PLAN, "at most, of a --dry-run of a stage without --latents", min=1)]
