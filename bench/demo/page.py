"""The demo's page of a finished Job: figures, and tables that format the numbers of results.json."""

import json
from pathlib import Path
from typing import Any

from bench.demo.figures import draw_block_masks, draw_loss, draw_schedule
from bench.demo.job import Job
from bench.demo.report import Table, write_report
from bench.demo.results import PLANNED_GPUS, collect
from k5kernels.atomic import replacing
from k5kernels.latents.video import BUCKETS
from k5kernels.token_layout import TokenLayout
from train.log import finite

GIB = 2**30
Results = dict[str, Any]


def sampling_table(results: Results) -> Table:
    """A row a path."""
    sampling = results["sampling"]
    rows = tuple(
        (
            path["path"],
            f"{path['time_s']:.1f}",
            f"{path['speed_up']:.2f}×",
            f"{path['density']:.1%}",
            f"{path['passes_that_ran_the_blocks']} of {path['passes']}",
            "–" if path["psnr_to_full_attention_db"] is None else f"{path['psnr_to_full_attention_db']:.1f}",
        )
        for path in sampling["paths"]
    )
    note = (
        f"{sampling['steps']} steps with classifier-free guidance {sampling['guidance']}; NABLA thr "
        f"{sampling['nabla_thr']}, STA window {tuple(sampling['sta_window_blocks'])}. One run each: on a busy machine "
        "the times move."
    )
    columns = ("path", "time [s]", "speed-up", "density", "passes that ran the blocks", "PSNR to full attention [dB]")
    return Table("Sampling one clip", columns, rows, note)


def job_table(results: Results) -> Table:
    """Encoding, reconstruction, training."""
    training = results["training"]
    rows = (
        ("encode the clip [s]", f"{results['encode_s']:.1f}"),
        ("reconstruction of the scene, PSNR [dB]", f"{results['reconstruction_psnr_db']:.2f}"),
        ("training step [s]", f"{training['step_s']:.2f}"),
        ("loss before training, fixed noise", f"{training['fixed_noise_loss_before']:.4f}"),
        ("loss after training, same noise", f"{training['fixed_noise_loss_after']:.4f}"),
    )
    return Table(f"{training['steps']} training steps", ("measured", "value"), rows)


def memory_table(results: Results) -> Table:
    """Peak memory of a training step."""
    rows = tuple((name, f"{peak / GIB:.2f}") for name, peak in results["training_step_memory_bytes"].items())
    note = (
        "Activation offload moves tensors from an accelerator to the host; on the CPU there is nothing to move. "
        "What it saves on a GPU is the planner's answer, below."
    )
    return Table("Peak memory that one training step adds", ("activations", "GiB"), rows, note)


def planner_table(results: Results) -> Table:
    """A row a model."""
    rows = tuple(
        (
            row["model"],
            f"{row['h100_step_s']:.2f}",
            f"{row['gpu_memory_bytes'] / GIB:.1f}",
            f"{row['gpu_memory_with_offload_bytes'] / GIB:.1f}",
        )
        for row in results["planner"]
    )
    columns = ("model", "step on an H100 [s]", "memory a GPU [GiB]", "memory a GPU with activation offload [GiB]")
    note = "Formulas of the Kandinsky 5.0 report, §7.3; predicted, not measured."
    caption = f"Planner: one clip of 5 s at 512×768 a GPU, dense attention, {PLANNED_GPUS} shards"
    return Table(caption, columns, rows, note)


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
    results = finite(collect(job))
    with replacing(job.out / "results.json") as partial:
        partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    page = job.out / "report.html"
    clip = results["clip"]
    write_report(
        page,
        f"k5kernels on {job.video.name}",
        f"{results['machine']}; ran on {results['device']}. Bucket {clip['height_px']}×{clip['width_px']} of "
        f"{sorted(BUCKETS)}.",
        job.out / "samples.mp4",
        "Left to right: source, reconstruction by the VAE, " + ", ".join(job.samples),
        [
            ("Sampling", [sampling_table(results)]),
            ("Which blocks attention reads", [masks]),
            ("MagCache", [schedule]),
            ("Encoding and training", [job_table(results), loss]),
            ("Memory", [memory_table(results)]),
            ("Planner", [planner_table(results)]),
        ],
    )
    return page
