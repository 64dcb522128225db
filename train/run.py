"""Train CrossDiT on latent shards, in one process or in many.

    torchrun -m train.run --stage nano_t2i --latents runs/latents --out runs/t2i
    torchrun -m train.run --stage nano_t2v --latents runs/latents --out runs/t2v --init runs/t2i
    torchrun --nproc-per-node 8 -m train.run --replicate 2 --sequence 2 --batch 4 …

A stage is a name (`train.stages`) or a file; `--print-stage` prints it as a file to edit and give back, and options on
the command line go before what it says. Writes `log.jsonl`, `checkpoints/` (the same command goes on from the newest)
and, when done, `crossdit.safetensors` with the averaged weights and `loss.png`. Every row of the log has the planner's
prediction beside what was measured, tokens a second and the share of the measured peak (MFU); `--dry-run` prints the
prediction and trains nothing, `--hardware` says for which machine.
"""

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from k5kernels.attention.nabla import record_block_masks
from k5kernels.device import choose_device
from k5kernels.latents.captions import read_captions
from k5kernels.planner import H100, load_profile
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.density import nabla_density
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import DeviceName, one_line_errors, one_line_stop
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae.config import TEMPORAL_STRIDE
from model.weights import save_crossdit
from train.building import build_model, check_text_width, model_config, offload_to
from train.checkpoint import KEEP
from train.crossdit_stage import CrossDiTStage, check_fits, check_resolutions, crossdit_settings
from train.dry_run import MOST_GPUS, print_run, print_stage_layout
from train.latents import LatentSet, read_shards
from train.log import Log
from train.loop import CHECKPOINTS, LOG, NONFINITE_LIMIT, Loop
from train.measuring import Measuring, measured_peak
from train.only_training import only_training
from train.parallel import Parallel, processes, whole_state
from train.pictures import draw_losses
from train.prediction import GIB, Run, predicted_memory, predicted_ms
from train.resident import resident_bytes
from train.same_settings import check_settings
from train.settings import Settings, make_settings
from train.stages import stage_values
from train.stored_model import WEIGHTS, open_model
from train.tracing import traced_steps

PROGRAM = "train.run"
TRACE, LOSSES = "trace.json", "loss.png"
OFFLOADED = "offloaded"  # folder in the run's for block inputs of the CPU


def chosen_settings(stage: str | None, given: dict[str, Any]) -> Settings:
    """The settings of a stage, or the defaults, with what was given (not None) in their place.

    Raises ValueError, one line, where a setting cannot be.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values, source = stage_values(stage) if stage is not None else ({}, "")
    return make_settings({**values, **given}, source)


def layout_of(parallel: Parallel, batch: int) -> ClusterLayout:
    """The processes as the planner counts them: its shards are those of the weights, over which sequences run too."""
    return ClusterLayout(
        parallel.shard * parallel.sequence, parallel.replicate, parallel.sequence, batch // parallel.data_ranks
    )


def save_averaged(stage: CrossDiTStage, out: Path) -> None:
    """Let the model take the averaged weights; the first process writes them to the folder in float16."""
    stage.average.copy_to(stage.model)
    weights = whole_state(stage.model)
    for name, tensor in weights.items():
        if not tensor.to(torch.float16).isfinite().all():
            raise ValueError(f"{out / WEIGHTS}: expected weights that float16 can hold, {name} has larger ones or nan")
    if weights:
        save_crossdit(out / WEIGHTS, stage.model, torch.float16, weights)


def train(loop: Loop, out: Path, every: int, measuring: Measuring, **options: Any) -> None:
    """Train to the end of the schedule.

    measuring: gives every row of the log what it has beside the loss. options: of `Loop.run`.
    """
    with record_block_masks(measuring.mask):
        loop.run(out, every, measuring, **options)


def captioned(data: LatentSet, wanted: bool) -> str:
    """How many clips have a caption, in words. Raises ValueError where none has one, though captions are wanted."""
    count = sum(data.grids.values())
    if wanted and not data.captioned:
        raise ValueError(
            f"0 of {count} clips have a caption: expected some in the shards or in --captions, by a video's path, name "
            "or stem; give --no-captions to train on the empty prompt"
        )
    return f"{data.captioned} of {count} clips have a caption"


def planned_run(settings: Settings, data: LatentSet, sizes: CrossDiTConfig, parallel: Parallel) -> Run:
    """What decides the time and the memory of a step, for the planner."""
    config = settings.training
    drawn = [data.weights(images if config.image_share else None, config.resolutions) for images in (False, True)]
    return Run(
        sizes,
        config,
        drawn[0],
        settings.checkpointing,
        nabla_density(settings.nabla_thr),
        layout_of(parallel, config.batch),
        settings.offload,
        drawn[1] if config.image_share else {},
    )


def main(
    latents: Annotated[Path | None, typer.Option(help="folder of latent shards (*.tar)")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the log, the checkpoints and the weights")] = None,
    stage: Annotated[
        str | None, typer.Option(help="a stage by name (train/stages.py), or its file (.json, .toml)")
    ] = None,
    print_stage: Annotated[
        bool, typer.Option("--print-stage", help="print the stage's settings as a file to edit, and train nothing")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="steps of the whole schedule; needed without a stage")] = None,
    preset: Annotated[
        str | None, typer.Option(help="sizes of the model; nano alone fits this trainer's text encoder")
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="start from these weights, or those of a run's folder, ended or not, not from random ones"),
    ] = None,
    model_dim: Annotated[
        int | None, typer.Option(min=1, help="width instead of the preset's, MLP 4 times as wide")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="CrossDiT blocks instead of the preset's")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSON, JSONL or CSV, by video; before those in the shards")
    ] = None,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="train on the empty prompt")] = False,
    batch: Annotated[int | None, typer.Option(help="samples in a step on clips, of all processes together")] = None,
    image_batch: Annotated[int | None, typer.Option(help="samples in a step on images; as many without")] = None,
    latent_frames: Annotated[int | None, typer.Option(min=1, help="keep the first so many latent frames")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's learning rate after the warm-up")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="of matrices; norms, biases, embeddings have none")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="steps over which the learning rate rises")] = None,
    decay_steps: Annotated[int | None, typer.Option(help="last steps, over which it falls to zero")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="of the running average of the weights")] = None,
    nabla_thr: Annotated[float | None, typer.Option(help="NABLA attention at this threshold; dense without")] = None,
    nabla_window: Annotated[
        bool | None, typer.Option("--nabla-window/--no-nabla-window", help="unite its mask with the 11×3×3 window")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="recompute each block in the backward")
    ] = None,
    offload: Annotated[
        bool | None, typer.Option("--offload/--no-offload", help="keep block inputs away until the backward needs them")
    ] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="on a CPU, where to; a folder in that of the run without")
    ] = None,
    offload_gib: Annotated[float, typer.Option(min=0, help="keep away at most so many GiB")] = math.inf,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="compute in bfloat16 (autocast); weights stay float32")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the random weights and of every draw")] = None,
    every: Annotated[int, typer.Option(min=1, help="steps between log rows and checkpoints")] = 50,
    keep: Annotated[int, typer.Option(min=1, help="checkpoints that stay, the newest")] = KEEP,
    nonfinite_limit: Annotated[
        int, typer.Option(min=1, help="steps in a row without a finite loss and gradients that end the training")
    ] = NONFINITE_LIMIT,
    set_on_resume: Annotated[
        bool, typer.Option("--set-on-resume", help="go on from a checkpoint of other settings with these")
    ] = False,
    replicate: Annotated[int, typer.Option(min=1, help="copies of the sharded weights among the processes")] = 1,
    shard: Annotated[
        int | None, typer.Option(min=1, help="data ranks of a copy; without it what the other two leave")
    ] = None,
    sequence: Annotated[int, typer.Option(min=1, help="processes that share the tokens of each sample")] = 1,
    hardware: Annotated[
        Path | None, typer.Option(help="hardware profile of the predictions, by k5 plan calibrate; H100 without")
    ] = None,
    profile: Annotated[
        int, typer.Option(min=0, help="trace so many steps, by operators and ranges, into trace.json")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the predicted time and memory, and refuse what cannot fit")
    ] = False,
    gpus: Annotated[int, typer.Option(min=1, help="at most, of a --dry-run of a stage without --latents")] = MOST_GPUS,
    device: DeviceName = None,
) -> None:
    """Train, or go on from the newest checkpoint in the folder."""
    if captions is not None and no_captions:
        raise typer.BadParameter("give --captions or --no-captions, not both")
    loop: Loop | None = None

    def left() -> str:
        if loop is None or not loop.saved or out is None:
            return "nothing is saved yet"
        return (
            f"{out / CHECKPOINTS} holds step {loop.saved} of {settings.steps}, and the same command goes on from there"
        )

    with one_line_errors(PROGRAM), one_line_stop(PROGRAM, left), ExitStack() as held:
        parallel = held.enter_context(processes(choose_device(device), replicate, shard, sequence))
        # What is wrong with the settings is said before anything is loaded.
        settings = chosen_settings(
            stage,
            {
                "steps": steps,
                "preset": preset,
                "batch": batch,
                "image_batch": image_batch,
                "frames": None if latent_frames is None else 1 + TEMPORAL_STRIDE * (latent_frames - 1),
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "warmup_steps": warmup_steps,
                "decay_steps": decay_steps,
                "ema_decay": ema_decay,
                "nabla_thr": nabla_thr,
                "nabla_window": nabla_window,
                "checkpointing": checkpointing,
                "offload": offload,
                "bf16": bf16,
                "seed": seed,
            },
        )
        if print_stage:
            if parallel.first:
                typer.echo(settings.as_json())
            return
        machine = H100 if hardware is None else load_profile(hardware)
        if dry_run and latents is None:
            if parallel.first:
                print_stage_layout(settings, machine, gpus)
            return
        if latents is None or (out is None and not dry_run):
            raise ValueError("expected --latents, shards to train on, and --out, a folder for the run")
        chosen = parallel.device
        config, schedule = settings.training, settings.schedule
        for images in (False, True):
            parallel.check_batch(config.batch_of(images))
        start_from = None if init is None else open_model(init, parallel=parallel)
        sizes = model_config(settings, start_from, model_dim, blocks)
        parallel.check_heads(sizes.heads)
        texts = read_captions(captions) if captions is not None else {}
        start = None if start_from is None else start_from.digest()
        if out is not None and not dry_run:
            settings.check_trainable()
            check_text_width(sizes, settings.preset)
            if parallel.first:
                held.enter_context(only_training(out))
            check_settings(
                out / CHECKPOINTS, schedule.settings | crossdit_settings(config, sizes, start), set_on_resume, parallel
            )
        data = LatentSet(read_shards(latents), None if no_captions else texts)
        check_resolutions(data, config)
        planned = planned_run(settings, data, sizes, parallel)
        if dry_run or out is None:
            if parallel.first:
                print_run(planned, machine)
            return
        words = captioned(data, wanted=not no_captions)
        if parallel.first:
            typer.echo(words)
        check_fits(data, sizes)
        disable_progress_bar()  # of the text encoder's weights
        encode_text = MiniLMTextEncoder(chosen).encode
        base = resident_bytes(chosen)
        prediction = {
            "predicted_ms": float(f"{predicted_ms(planned, machine):.4g}"),
            "predicted_bytes": round(base + predicted_memory(planned).total_bytes),
            "base_bytes": base,
            "hardware": machine.name,
        }
        model = build_model(sizes, start_from, settings.seed, parallel, settings.bf16)
        model.gradient_checkpointing = settings.checkpointing
        if settings.offload:
            model.offload = offload_to(offload_folder or out / OFFLOADED, chosen, GIB * offload_gib)
        crossdit = CrossDiTStage(model, data, encode_text, config, start, parallel)
        loop = Loop(crossdit, schedule, parallel)
        peak = parallel.world * measured_peak(chosen, torch.bfloat16 if settings.bf16 else torch.float32)
        measuring = Measuring(crossdit, parallel, peak, prediction)
        limits = {"keep": keep, "nonfinite_limit": nonfinite_limit}
        with traced_steps(crossdit.optimizers["adamw"], out / TRACE, profile if parallel.first else 0):
            train(loop, out, every, measuring, set_on_resume=set_on_resume, **limits)
        save_averaged(crossdit, out)
        if parallel.first and (out / LOG).exists():
            draw_losses(Log(out / LOG).rows(), out / LOSSES)


if __name__ == "__main__":
    typer.run(main)
