"""Train CrossDiT on latent shards, in one process or in many.

    torchrun -m train.run --stage nano_t2i --latents runs/latents --out runs/t2i
    torchrun -m train.run --stage nano_t2v --latents runs/latents --out runs/t2v --init runs/t2i
    torchrun --nproc-per-node 8 -m train.run --replicate 2 --sequence 2 --batch 4 …

A stage is a name (`train.stages`) or a file; `--print-stage` prints it as a file to edit and give back, and options on
the command line go before what it says. Writes `log.jsonl`, `checkpoints/` (the same command goes on from the newest)
and, when done, `crossdit.safetensors` with the averaged weights and `loss.png`; with `--vae` a strip of frames that the
model samples at milestones, too. Every row of the log has the planner's prediction beside what was measured, tokens a
second and the share of the measured peak (MFU); `--dry-run` prints the prediction and trains nothing, `--hardware` says
for which machine.

The options are explained in `train.options`; the steps are those of `train.loop`.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from k5kernels.attention.nabla import record_block_masks
from k5kernels.device import choose_device
from k5kernels.latents.captions import read_captions
from k5kernels.planner import H100, load_profile
from k5kernels.terminal import one_line_errors, one_line_stop
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae.config import TEMPORAL_STRIDE
from k5kernels.vae.weights import load_decoder
from model.weights import save_crossdit
from train import options
from train.building import build_model, check_text_width, model_config, offload_to
from train.checkpoint import KEEP
from train.crossdit_stage import CrossDiTStage, check_fits, check_resolutions, crossdit_settings
from train.dry_run import MOST_GPUS, print_run, print_stage_layout
from train.latents import LatentSet, read_shards
from train.log import Log
from train.loop import CHECKPOINTS, LOG, NONFINITE_LIMIT, Loop
from train.measuring import Measuring, measured_peak
from train.only_training import only_training
from train.parallel import processes, whole_state
from train.pictures import draw_losses
from train.prediction import GIB, in_log, planned_run
from train.same_settings import check_settings
from train.samples import Samples, strips
from train.settings import Settings, make_settings
from train.stages import stage_values
from train.stored_model import WEIGHTS, open_model
from train.tracing import traced_steps

PROGRAM = "train.run"
TRACE, LOSSES = "trace.json", "loss.png"
MILESTONES = 4  # at which samples are drawn
OFFLOADED = "offloaded"  # folder in the run's for block inputs of the CPU


def main(
    context: typer.Context,
    stage: options.StageName = None,
    steps: options.Steps = None,
    preset: options.Preset = None,
    model_dim: options.ModelDim = None,
    blocks: options.Blocks = None,
    batch: options.Batch = None,
    image_batch: options.ImageBatch = None,
    latent_frames: options.LatentFrames = None,
    learning_rate: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    warmup_steps: options.WarmupSteps = None,
    decay_steps: options.DecaySteps = None,
    ema_decay: options.EmaDecay = None,
    nabla_thr: options.NablaThr = None,
    nabla_window: options.NablaWindow = None,
    bf16: options.Bf16 = None,
    seed: options.Seed = None,
    latents: options.Latents = None,
    init: options.Init = None,
    captions: options.Captions = None,
    no_captions: options.NoCaptions = False,
    out: options.Out = None,
    every: options.Every = 50,
    keep: options.Keep = KEEP,
    nonfinite_limit: options.NonfiniteLimit = NONFINITE_LIMIT,
    set_on_resume: options.SetOnResume = False,
    vae: options.Vae = None,
    samples: options.Samples = None,
    profile: options.ProfileSteps = 0,
    checkpointing: options.Checkpointing = None,
    offload: options.Offload = None,
    offload_folder: options.OffloadFolder = None,
    offload_gib: options.OffloadGib = math.inf,
    replicate: options.Replicate = 1,
    shard: options.Shard = None,
    sequence: options.Sequence = 1,
    print_stage: options.PrintStage = False,
    dry_run: options.DryRun = False,
    hardware: options.Hardware = None,
    gpus: options.Gpus = MOST_GPUS,
    device: options.Device = None,
) -> None:
    """Train, or go on from the newest checkpoint in the folder."""
    if captions is not None and no_captions:
        raise typer.BadParameter("give --captions or --no-captions, not both")
    if samples is not None and vae is None:
        raise typer.BadParameter("--samples is how often --vae draws: give --vae too")
    loop: Loop | None = None

    def left() -> str:
        if loop is None or not loop.saved or out is None:
            return "nothing is saved yet"
        return (
            f"{out / CHECKPOINTS} holds step {loop.saved} of {settings.steps}, and the same command goes on from there"
        )

    with one_line_errors(PROGRAM), one_line_stop(PROGRAM, left), ExitStack() as held:
        parallel = held.enter_context(processes(choose_device(device), replicate, shard, sequence))
        chosen = parallel.device

        # What is wrong with the settings is said before anything is loaded.
        settings = chosen_settings(stage, stage_options(context.params))
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
        config, schedule = settings.training, settings.schedule
        for images in (False, True):
            parallel.check_batch(config.batch_of(images))
        start_from = None if init is None else open_model(init, parallel=parallel)
        sizes = model_config(settings, start_from, model_dim, blocks)
        parallel.check_heads(sizes.heads)
        texts = read_captions(captions) if captions is not None else {}
        start = None if start_from is None else start_from.digest()
        decoder = load_decoder(vae).to(chosen) if vae is not None and parallel.first else None
        if out is not None and not dry_run:
            settings.check_trainable()
            check_text_width(sizes, settings.preset)
            if parallel.first:
                held.enter_context(only_training(out))
            check_settings(
                out / CHECKPOINTS, schedule.settings | crossdit_settings(config, sizes, start), set_on_resume, parallel
            )

        # The data, and what the planner says of a run on them.
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
        prediction = in_log(planned, machine, chosen)

        # The model, sharded over the processes.
        model = build_model(sizes, start_from, settings.seed, parallel, settings.bf16)
        model.gradient_checkpointing = settings.checkpointing
        if settings.offload:
            model.offload = offload_to(offload_folder or out / OFFLOADED, chosen, GIB * offload_gib)
        crossdit = CrossDiTStage(model, data, encode_text, config, start, parallel)
        loop = Loop(crossdit, schedule, parallel)

        # Training, and what is seen of it.
        peak = parallel.world * measured_peak(chosen, torch.bfloat16 if settings.bf16 else torch.float32)
        measuring = Measuring(crossdit, parallel, peak, prediction)
        drawing = None
        if vae is not None:
            drawing = Samples(
                crossdit, decoder, out, steps=schedule.steps, every=every, milestones=samples or MILESTONES
            )
        limits = {"keep": keep, "nonfinite_limit": nonfinite_limit}
        with traced_steps(crossdit.optimizers["adamw"], out / TRACE, profile if parallel.first else 0):
            train(loop, out, every, measuring, drawing, set_on_resume=set_on_resume, trace=not profile, **limits)
        save_averaged(crossdit, out)


def train(
    loop: Loop, out: Path, every: int, measuring: Measuring, drawing: Samples | None, *, trace: bool, **limits: Any
) -> None:
    """Train to the end of the schedule, with pictures of it in the folder.

    measuring: gives every row of the log what it has beside the loss. drawing: samples, where there is a VAE. trace:
    for the share of communication. limits: as `Loop.run` takes them, `set_on_resume` too.
    """

    def draw(done: int) -> None:
        if drawing is not None and (picture := drawing(done)) is not None:
            typer.echo(f"step {done}: {picture}")
            draw_losses(Log(out / LOG).rows(), out / LOSSES, strips(out))
        measuring.densities.clear()  # those of a sample are no step's

    with record_block_masks(measuring.mask):
        loop.run(out, every, measuring, trace_communication=trace, after_row=draw, **limits)
    if loop.parallel.first and (out / LOG).exists():
        draw_losses(Log(out / LOG).rows(), out / LOSSES, strips(out))


def stage_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the command's options that settings of a stage have a key for; frames count pixels' there."""
    keys = {key.name for key in fields(Settings)}
    frames = given["latent_frames"]
    return {
        **{name: value for name, value in given.items() if name in keys},
        "frames": None if frames is None else 1 + TEMPORAL_STRIDE * (frames - 1),
    }


def chosen_settings(stage: str | None, given: dict[str, Any]) -> Settings:
    """The settings of a stage, or the defaults, with what was given (not None) in their place.

    Raises ValueError, one line, where a setting cannot be.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values, source = stage_values(stage) if stage is not None else ({}, "")
    return make_settings({**values, **given}, source)


def captioned(data: LatentSet, wanted: bool) -> str:
    """How many clips have a caption, in words. Raises ValueError where none has one, though captions are wanted."""
    count = sum(data.grids.values())
    if wanted and not data.captioned:
        raise ValueError(
            f"0 of {count} clips have a caption: expected some in the shards or in --captions, by a video's path, name "
            "or stem; give --no-captions to train on the empty prompt"
        )
    return f"{data.captioned} of {count} clips have a caption"


def save_averaged(stage: CrossDiTStage, out: Path) -> None:
    """Let the model take the averaged weights; the first process writes them to the folder in float16."""
    stage.average.copy_to(stage.model)
    weights = whole_state(stage.model)
    for name, tensor in weights.items():
        if not tensor.to(torch.float16).isfinite().all():
            raise ValueError(f"{out / WEIGHTS}: expected weights that float16 can hold, {name} has larger ones or nan")
    if weights:
        save_crossdit(out / WEIGHTS, stage.model, torch.float16, weights)


if __name__ == "__main__":
    typer.run(main)
