"""Trains CrossDiT-nano on the latents of three short clips, calibrates MagCache and measures NABLA.

    python -m train.nano_crossdit --out runs/nano_crossdit             train, calibrate, measure
    python -m train.nano_crossdit --out runs/nano_crossdit --evaluate  calibrate and measure the shipped weights

Short to long, as in pre-training: single frames, three latent frames, seven. The last quarter of each clip is held
out, and what the approximations cost is measured on a clip that starts there.
"""

from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.cache import MagCache, MagCalibration
from k5kernels.device import choose_device, device_of
from k5kernels.latents.record import ClipRecord
from k5kernels.latents.shards import Sample, ShardWriter, read_shard
from k5kernels.latents.video import to_model
from k5kernels.terminal import DeviceName, one_line_errors, one_line_stop
from k5kernels.text_encoders import MiniLMTextEncoder
from k5kernels.vae import latent_frames
from k5kernels.vae.weights import load_decoder, load_encoder
from model.crossdit import CrossDiT
from model.nano import CLIP_FRAMES, CROSSDIT_WEIGHTS, RESOLUTION, VAE_WEIGHTS, NanoSettings
from model.presets import PRESETS
from model.weights import load_crossdit
from train.clips import CAPTIONS, NAMES, load_clip, split
from train.crossdit_stage import CrossDiTStage, FlowMatching
from train.evaluation import Scene, generate, psnr
from train.latents import LatentSet
from train.log import Log
from train.loop import LOG, Loop
from train.nano_settings import record
from train.only_training import only_training
from train.run import WEIGHTS, save_averaged
from train.schedule import Schedule

PROGRAM = "train.nano_crossdit"
WINDOW_STRIDE = 8
STEPS = 50
THRESHOLDS = (0.9, 0.7, 0.4)

SAMPLING = NanoSettings(thr=0.7, sta=(1, 3, 3), guidance=2.0, scheduler_scale=3.0, mag_ratios={})
STAGE = FlowMatching(ema_decay=0.998, scheduler_scale=SAMPLING.scheduler_scale, bf16=True)
STAGES = (
    (Schedule(steps=250, seed=0), replace(STAGE, batch=8, latent_frames=1, learning_rate=1e-3)),
    (Schedule(steps=250, seed=1), replace(STAGE, batch=2, latent_frames=3, learning_rate=1e-3)),
    (Schedule(steps=450, seed=2, decay_steps=250), replace(STAGE, batch=1, learning_rate=7e-4)),
)


def encode_clips(path: Path, device: torch.device) -> None:
    """One shard with the latents of overlapping windows of every clip's training frames."""
    encoder = load_encoder(VAE_WEIGHTS).to(device)
    with ShardWriter(path) as shard, torch.inference_mode():
        for name in NAMES:
            frames, _ = split(load_clip(name, RESOLUTION))
            starts = range(0, frames.shape[0] - CLIP_FRAMES + 1, WINDOW_STRIDE)
            for start in track(starts, description=f"encode {name}"):
                latent = encoder(to_model(frames[start : start + CLIP_FRAMES]).to(device))[0]
                height, width = frames.shape[1:3]
                record = ClipRecord(CLIP_FRAMES, height, width, Fraction(25), f"{name}.mp4", first_frame=start)
                shard.write(Sample(f"{name}-{start:04d}", latent, record))


def train_stages(out: Path, shard: Path, device: torch.device) -> CrossDiT:
    """The stages one after the other, each in its own folder and resumable; the last one's averaged weights."""
    data, encoder = LatentSet(read_shard(shard), CAPTIONS), MiniLMTextEncoder(device)
    torch.manual_seed(0)
    model = CrossDiT(PRESETS["nano"]).to(device)
    for number, (schedule, config) in enumerate(STAGES):
        stage, folder = CrossDiTStage(model, data, encoder.encode, config), out / f"stage{number}"
        Loop(stage, schedule).run(folder, every=100)
        save_averaged(stage, folder)
    return load_crossdit(folder / WEIGHTS).to(device)


def stage_figures(out: Path) -> list[dict[str, Any]]:
    """Size, time and last mean loss of every stage, from its log."""
    figures = []
    for number, (schedule, config) in enumerate(STAGES):
        log = Log(out / f"stage{number}" / LOG)
        sizes = {"latent_frames": config.latent_frames or latent_frames(CLIP_FRAMES)}
        sizes |= {"batch": config.batch, "steps": schedule.steps}
        last = log.rows()[-1]["loss"]
        figures.append(sizes | {"seconds": round(log.seconds()), "last_mean_loss": last})
    return figures


def held_out_scene(name: str, device: torch.device) -> Scene:
    """The first held-out frames of a clip and its caption."""
    _, frames = split(load_clip(name, RESOLUTION))
    encoder = MiniLMTextEncoder(device)
    with torch.inference_mode():
        latent = load_encoder(VAE_WEIGHTS).to(device)(to_model(frames[:CLIP_FRAMES]).to(device))
    return Scene(latent.permute(0, 2, 3, 4, 1).clone(), encoder.encode([CAPTIONS[name]]), encoder.encode([""]))


def calibrate_and_measure(model: CrossDiT) -> dict[str, Any]:
    """MagCache's ratios, and for each approximation its PSNR to full attention: what settings.json keeps."""
    device = device_of(model)
    scene, decoder = held_out_scene(NAMES[0], device), load_decoder(VAE_WEIGHTS).to(device)
    calibration = MagCalibration()
    full = generate(model, decoder, scene, SAMPLING, DENSE, calibration, steps=STEPS, seed=0)
    settings = replace(SAMPLING, mag_ratios={k: [round(r, 5) for r in v] for k, v in calibration.ratios.items()})
    figures = []
    for thr in THRESHOLDS:
        attention = AttentionConfig("nabla", thr, None)
        nabla = generate(model, decoder, scene, settings, attention, steps=STEPS, seed=0)
        row = {
            "thr": thr,
            "density": round(nabla.density, 4),
            "psnr_to_full_db": round(psnr(nabla.frames, full.frames), 2),
        }
        figures.append(row)
    cached = generate(model, decoder, scene, settings, DENSE, MagCache(settings.mag_ratios), steps=STEPS, seed=0)
    magcache = {"psnr_to_full_db": round(psnr(cached.frames, full.frames), 2)}
    return {"sampling": asdict(settings), "nabla_without_sta": figures, "magcache_dense": magcache}


@one_line_errors(PROGRAM)
@one_line_stop(PROGRAM, lambda: "the same command goes on from the last checkpoint")
def main(
    out: Annotated[Path, typer.Option(help="folder for latents, stages and figures")],
    evaluate: Annotated[bool, typer.Option(help="measure the shipped weights instead of training")] = False,
    settings: Annotated[Path | None, typer.Option(help="JSON file that gets the figures; out/settings.json")] = None,
    device: DeviceName = None,
) -> None:
    """Train, or go on; then measure."""
    chosen = choose_device(device)
    figures: dict[str, Any] = {}
    with only_training(out):
        if evaluate:
            model = load_crossdit(CROSSDIT_WEIGHTS).to(chosen)
        else:
            shard = out / "latents.tar"
            if not shard.exists():
                encode_clips(shard, chosen)
            model = train_stages(out, shard, chosen)
            figures["crossdit"] = {"script": "train/nano_crossdit.py", "seed": 0, "stages": stage_figures(out)}
        record(settings or out / "settings.json", figures | calibrate_and_measure(model))


if __name__ == "__main__":
    typer.run(main)
