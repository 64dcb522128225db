"""Train CrossDiT on latent shards, in one process or in many.

    torchrun -m train.run --latents runs/latents --init model/nano/crossdit.safetensors --out runs/first --steps 200
    torchrun --nproc-per-node 8 -m train.run --replicate 2 --sequence 2 --batch 4 …

Writes `log.jsonl`, `checkpoints/` (the same command goes on from the newest) and, when done, `crossdit.safetensors`
with the averaged weights. Every row of the log has the planner's prediction beside what was measured; `--dry-run`
prints the prediction and trains nothing, `--profile` says for which machine.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from k5kernels.attention import DENSE, RELEASED_WINDOW, AttentionConfig
from k5kernels.attention.nabla import record_block_masks
from k5kernels.device import choose_device
from k5kernels.latents.captions import read_captions
from k5kernels.planner import H100, HardwareProfile, load_profile
from k5kernels.planner.cluster_layout import ClusterLayout
from k5kernels.planner.density import nabla_density
from k5kernels.planner.values import term_words
from k5kernels.presets import CrossDiTConfig
from k5kernels.terminal import DeviceName, complain, one_line_errors, one_line_stop
from k5kernels.text_encoders import MiniLMTextEncoder
from model.crossdit import CrossDiT
from model.presets import PRESETS
from model.weights import load_crossdit, read_crossdit_config, save_crossdit
from train.checkpoint import check_settings
from train.crossdit_stage import CrossDiTStage, FlowMatching, check_fits, crossdit_settings
from train.latents import LatentSet, read_shards
from train.loop import CHECKPOINTS, Loop
from train.only_training import only_training
from train.parallel import Parallel, processes, shard_model, whole_state
from train.prediction import GIB, Run, nearest_layout, predicted_memory, predicted_ms
from train.resident import peak_bytes, resident_bytes
from train.schedule import Schedule

PROGRAM = "train.run"
WEIGHTS = "crossdit.safetensors"
TEXT_WIDTH = 384  # of MiniLM's tokens
MLP_WIDENING = 4  # of the released models


def model_config(preset: str, init: Path | None, model_dim: int | None, blocks: int | None) -> CrossDiTConfig:
    """The config of the weights to start from, or the preset's, with another width or depth where given."""
    if init is not None:
        if model_dim is not None or blocks is not None:
            raise typer.BadParameter("the weights of --init have their own sizes: leave out --model-dim and --blocks")
        return read_crossdit_config(init)
    if preset not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {preset}", param_hint="--preset")
    config = PRESETS[preset]
    if config.in_text_dim != TEXT_WIDTH:
        raise typer.BadParameter(
            f"expected nano: {preset} takes text of width {config.in_text_dim}, this trainer's encoder gives "
            f"{TEXT_WIDTH}",
            param_hint="--preset",
        )
    if model_dim is not None:
        if model_dim % config.head_dim:
            raise typer.BadParameter(
                f"expected a multiple of the head dim {config.head_dim}, got {model_dim}", param_hint="--model-dim"
            )
        config = replace(config, model_dim=model_dim, ff_dim=MLP_WIDENING * model_dim)
    return config if blocks is None else replace(config, visual_blocks=blocks)


def build_model(
    config: CrossDiTConfig, init: Path | None, checkpointing: bool, seed: int, device: torch.device
) -> CrossDiT:
    """Random weights, or weights from a file."""
    torch.manual_seed(seed)
    model = load_crossdit(init) if init is not None else CrossDiT(config)
    model.gradient_checkpointing = checkpointing
    return model.to(device)


def layout_of(parallel: Parallel, batch: int) -> ClusterLayout:
    """The processes as the planner counts them: its shards are those of the weights, over which sequences run too."""
    return ClusterLayout(
        parallel.shard * parallel.sequence, parallel.replicate, parallel.sequence, batch // parallel.data_ranks
    )


def dry_run(planned: Run, profile: HardwareProfile) -> None:
    """Print what the planner says of the run. Raises typer.Exit(1), after one line on stderr, where it cannot fit."""
    memory = predicted_memory(planned)
    if planned.layout.gpus > 1:
        typer.echo(f"layout: {planned.layout}")
    typer.echo(f"on {profile.name}: a step takes {predicted_ms(planned, profile):,.1f} ms")
    terms = ", ".join(f"{term_words(name)} {size / GIB:,.2f}" for name, size in asdict(memory).items() if size)
    typer.echo(f"memory {memory.total_bytes / GIB:,.2f} of {profile.memory_bytes / GIB:,.2f} GiB: {terms}")
    if memory.total_bytes > profile.memory_bytes:
        complain(
            f"does not fit: {memory.total_bytes / GIB:,.2f} GiB, expected at most "
            f"{profile.memory_bytes / GIB:,.2f} GiB of {profile.name}; {nearest_layout(planned, profile)}",
            PROGRAM,
        )
        raise typer.Exit(1)


def save_averaged(stage: CrossDiTStage, out: Path) -> None:
    """Let the model take the averaged weights; the first process writes them to the folder in float16."""
    stage.average.copy_to(stage.model)
    weights = whole_state(stage.model)
    for name, tensor in weights.items():
        if not tensor.to(torch.float16).isfinite().all():
            raise ValueError(f"{out / WEIGHTS}: expected weights that float16 can hold, {name} has larger ones or nan")
    if weights:
        save_crossdit(out / WEIGHTS, stage.model, torch.float16, weights)


def train(loop: Loop, out: Path, every: int, prediction: dict[str, Any], set_on_resume: bool) -> None:
    """Train to the end of the schedule.

    prediction: goes into every row of the log, beside the memory and the density that were measured.
    """
    densities: list[float] = []

    def measure() -> dict[str, Any]:
        density = loop.parallel.mean(torch.tensor(fmean(densities or [1.0]))).item()
        densities.clear()
        return {"peak_bytes": peak_bytes(loop.stage.device), "density": round(density, 4), **prediction}

    with record_block_masks(lambda mask: densities.append(mask.density)):
        loop.run(out, every, measure, set_on_resume=set_on_resume)


def captioned(data: LatentSet, wanted: bool) -> str:
    """How many clips have a caption, in words. Raises ValueError where none has one, though captions are wanted."""
    count = sum(data.grids.values())
    if wanted and not data.captioned:
        raise ValueError(
            f"0 of {count} clips have a caption: expected some in the shards or in --captions, by a video's path, name "
            "or stem; give --no-captions to train on the empty prompt"
        )
    return f"{data.captioned} of {count} clips have a caption"


def weights_digest(path: Path) -> str:
    """A hash of a weights file, or of all in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for name in files:
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()[:16]}"


def main(
    latents: Annotated[Path, typer.Option(help="folder of latent shards (*.tar)")],
    out: Annotated[Path, typer.Option(help="folder for the log, the checkpoint and the weights")],
    steps: Annotated[int, typer.Option(min=1, help="steps of the whole schedule")],
    preset: Annotated[
        str, typer.Option(help="sizes of the model; nano alone fits this trainer's text encoder")
    ] = "nano",
    init: Annotated[Path | None, typer.Option(help="start from these weights instead of random ones")] = None,
    model_dim: Annotated[
        int | None, typer.Option(min=1, help="width instead of the preset's, MLP 4 times as wide")
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="CrossDiT blocks instead of the preset's")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSON, JSONL or CSV, by video; before those in the shards")
    ] = None,
    no_captions: Annotated[bool, typer.Option("--no-captions", help="train on the empty prompt")] = False,
    batch: Annotated[int, typer.Option(min=1, help="samples in a step, of all processes together")] = 1,
    latent_frames: Annotated[int | None, typer.Option(min=1, help="keep the first so many latent frames")] = None,
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate after the warm-up")] = 1e-4,
    warmup_steps: Annotated[int, typer.Option(min=0, help="steps over which the learning rate rises")] = 100,
    decay_steps: Annotated[int, typer.Option(min=0, help="last steps, over which it falls to zero")] = 0,
    ema_decay: Annotated[float, typer.Option(min=0, max=1, help="of the running average of the weights")] = 0.9999,
    nabla_thr: Annotated[
        float | None, typer.Option(min=0, max=1, help="NABLA attention at this threshold; dense without")
    ] = None,
    nabla_window: Annotated[bool, typer.Option(help="unite NABLA's mask with the 11×3×3 window of blocks")] = True,
    checkpointing: Annotated[bool, typer.Option(help="recompute each block in the backward pass")] = True,
    bf16: Annotated[bool, typer.Option(help="compute in bfloat16 (autocast); weights stay float32")] = False,
    seed: Annotated[int, typer.Option(help="of the random weights and of every draw")] = 0,
    every: Annotated[int, typer.Option(min=1, help="steps between log rows and checkpoints")] = 50,
    set_on_resume: Annotated[
        bool, typer.Option("--set-on-resume", help="go on from a checkpoint of other settings with these")
    ] = False,
    replicate: Annotated[int, typer.Option(min=1, help="copies of the sharded weights among the processes")] = 1,
    shard: Annotated[
        int | None, typer.Option(min=1, help="data ranks of a copy; without it what the other two leave")
    ] = None,
    sequence: Annotated[int, typer.Option(min=1, help="processes that share the tokens of each sample")] = 1,
    profile: Annotated[
        Path | None, typer.Option(help="hardware profile of the predictions, by k5 plan calibrate; H100 without")
    ] = None,
    dry_run_only: Annotated[
        bool, typer.Option("--dry-run", help="print the predicted time and memory, and refuse what cannot fit")
    ] = False,
    device: DeviceName = None,
) -> None:
    """Train, or go on from the checkpoint in the folder."""
    if captions is not None and no_captions:
        raise typer.BadParameter("give --captions or --no-captions, not both")
    loop: Loop | None = None

    def left() -> str:
        if loop is None or not loop.saved:
            return "nothing is saved yet"
        return f"{out / CHECKPOINTS} holds step {loop.saved} of {steps}, and the same command goes on from there"

    with one_line_errors(PROGRAM), one_line_stop(PROGRAM, left), ExitStack() as held:
        # What is wrong with the settings is said before anything is loaded.
        parallel = held.enter_context(processes(choose_device(device), replicate, shard, sequence))
        window = RELEASED_WINDOW if nabla_window else None
        attention = DENSE if nabla_thr is None else AttentionConfig("nabla", nabla_thr, window)
        schedule = Schedule(steps, warmup_steps, decay_steps, seed=seed)
        config = FlowMatching(
            batch=batch,
            latent_frames=latent_frames,
            learning_rate=learning_rate,
            ema_decay=ema_decay,
            attention=attention,
            bf16=bf16,
        )
        chosen = parallel.device
        parallel.check_batch(batch)
        hardware = H100 if profile is None else load_profile(profile)
        sizes = model_config(preset, init, model_dim, blocks)
        parallel.check_heads(sizes.heads)
        texts = read_captions(captions) if captions is not None else {}
        if not dry_run_only:
            if parallel.first:
                held.enter_context(only_training(out))
            start = None if init is None else weights_digest(init)
            known = schedule.settings | crossdit_settings(config, sizes, start)
            check_settings(out / CHECKPOINTS, known, set_on_resume)
        data = LatentSet(read_shards(latents), None if no_captions else texts)
        planned = Run(sizes, config, data.grids, checkpointing, nabla_density(nabla_thr), layout_of(parallel, batch))
        if dry_run_only:
            if parallel.first:
                dry_run(planned, hardware)
            return
        words = captioned(data, wanted=not no_captions)
        if parallel.first:
            typer.echo(words)
        check_fits(data, sizes)
        disable_progress_bar()  # of the text encoder's weights
        encode_text = MiniLMTextEncoder(chosen).encode
        base = resident_bytes(chosen)
        prediction = {
            "predicted_ms": float(f"{predicted_ms(planned, hardware):.4g}"),
            "predicted_bytes": round(base + predicted_memory(planned).total_bytes),
            "base_bytes": base,
            "profile": hardware.name,
        }
        model = shard_model(build_model(sizes, init, checkpointing, seed, chosen), parallel, bf16)
        stage = CrossDiTStage(model, data, encode_text, config, start, parallel)
        loop = Loop(stage, schedule, parallel)
        train(loop, out, every, prediction, set_on_resume)
        save_averaged(stage, out)


if __name__ == "__main__":
    typer.run(main)
