"""What the demo shows of a finished Job: figures and tables, every number from that run."""

import json
from importlib.metadata import version
from pathlib import Path

import torch

from bench.demo.figures import draw_block_masks, draw_loss, draw_schedule
from bench.demo.job import PLAIN, Job
from bench.demo.report import Table, write_report
from bench.harness import machine
from k5kernels.atomic import replacing
from k5kernels.latents.video import BUCKETS
from k5kernels.planner import MODELS, ClipShape, memory_bytes, step_time_ms
from k5kernels.token_layout import TokenLayout
from train.evaluation import psnr

GIB = 2**30
PLANNED_GPUS = 64


def setting() -> str:
    """Machine, threads and version, for every table's reader."""
    return f"{machine()}; {torch.get_num_threads()} threads, k5kernels {version('k5kernels')}"


def sampling_table(job: Job) -> Table:
    """Time, ratio, density and distance of each path to the plain one."""
    plain = job.samples[PLAIN]
    rows = []
    for name, sample in job.samples.items():
        same = sample is plain
        cache = job.paths[name][1]
        passes = [ran for schedule in cache.schedule.values() for ran in schedule] if cache else [True] * sample.passes
        rows.append(
            (
                name,
                f"{sample.seconds:.1f}",
                f"{plain.seconds / sample.seconds:.2f}×",
                f"{sample.density:.1%}",
                f"{sum(passes)} of {len(passes)}",
                "–" if same else f"{psnr(sample.frames, plain.frames):.1f}",
            )
        )
    note = (
        f"{plain.passes // 2} steps with classifier-free guidance {job.nano.guidance}; NABLA thr {job.nano.thr}, "
        f"STA window {job.nano.sta}. One run each: on a busy machine the times move."
    )
    columns = ("path", "time [s]", "speed-up", "density", "passes that ran the blocks", "PSNR to full attention [dB]")
    return Table("Sampling one clip", columns, tuple(rows), note)


def job_table(job: Job) -> Table:
    """Encoding, reconstruction, training."""
    training = job.training
    rows = (
        ("encode the clip [s]", f"{job.encode_seconds:.1f}"),
        ("reconstruction of the scene, PSNR [dB]", f"{job.reconstruction_db:.2f}"),
        ("training step [s]", f"{training.seconds / len(training.losses):.2f}"),
        ("loss before training, fixed noise", f"{training.before:.4f}"),
        ("loss after training, same noise", f"{training.after:.4f}"),
    )
    return Table(f"{len(training.losses)} training steps", ("measured", "value"), rows)


def memory_table(job: Job) -> Table:
    """Peak memory of a training step."""
    rows = tuple((name, f"{peak / GIB:.2f}") for name, peak in job.memory.items())
    note = (
        "Activation offload moves tensors from an accelerator to the host; on the CPU there is nothing to move. "
        "What it saves on a GPU is the planner's answer, below."
    )
    return Table("Peak memory that one training step adds", ("activations", "GiB"), rows, note)


def planner_table() -> Table:
    """The report's two formulas for a 5 s clip at 512×768."""
    clip = ClipShape(512, 768, 121)
    rows = []
    for name in ("video_lite", "video_pro"):
        shape = MODELS[name]
        sizes = (shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks)
        memory = [memory_bytes(*sizes, clip.tokens, PLANNED_GPUS, offload) / GIB for offload in (False, True)]
        time = step_time_ms(shape.model_dim, clip.pixels, shape.blocks, 1) / 1e3
        rows.append((name, f"{time:.2f}", f"{memory[0]:.1f}", f"{memory[1]:.1f}"))
    columns = ("model", "step on an H100 [s]", "memory a GPU [GiB]", "memory a GPU with activation offload [GiB]")
    note = "Formulas of the Kandinsky 5.0 report, §7.3; predicted, not measured."
    caption = f"Planner: one clip of 5 s at 512×768 a GPU, dense attention, {PLANNED_GPUS} shards"
    return Table(caption, columns, tuple(rows), note)


def mask_figure(job: Job, path: Path) -> Path:
    """Masks of some heads in the middle block, on the last pass of the NABLA sample."""
    T, H, W = job.scene.latent.shape[1:4]
    sample = job.samples["NABLA"]
    mask = sample.last_masks[len(sample.last_masks) // 2]
    return draw_block_masks(mask, TokenLayout(((T, H // 2, W // 2),)), sample.frames[::4], path)


def write_page(job: Job) -> Path:
    """Draw the figures, write report.html and results.json; the path of the page."""
    loss = draw_loss(job.training.losses, job.out / "loss.png")
    masks = mask_figure(job, job.out / "block_masks.png")
    schedule = draw_schedule(job.magcache.schedule, job.nano.mag_ratios, job.out / "magcache.png")
    tables = {"job": job_table(job), "sampling": sampling_table(job), "memory": memory_table(job)}
    results = {name: {"columns": table.columns, "rows": table.rows} for name, table in tables.items()}
    with replacing(job.out / "results.json") as partial:
        partial.write_text(json.dumps({"machine": setting()} | results, indent=1) + "\n")
    page = job.out / "report.html"
    height, width = job.sample_record.height, job.sample_record.width
    write_report(
        page,
        f"k5kernels on {job.video.name}",
        f"{setting()}. Bucket {height}×{width} of {sorted(BUCKETS)}.",
        job.out / "samples.mp4",
        "Left to right: source, reconstruction by the VAE, " + ", ".join(job.samples),
        [
            ("Sampling", [tables["sampling"]]),
            ("Which blocks attention reads", [masks]),
            ("MagCache", [schedule]),
            ("Encoding and training", [tables["job"], loss]),
            ("Memory", [tables["memory"]]),
            ("Planner", [planner_table()]),
        ],
    )
    return page
