"""The numbers of a finished Job: what results.json holds and the page shows. Units stand in the names."""

from importlib.metadata import version
from typing import Any

import torch

from bench.demo.job import PLAIN, Job
from bench.harness import machine
from k5kernels.planner import MODELS, ClipShape, memory_bytes, step_time_ms
from train.evaluation import psnr

PLANNED_GPUS = 64
PLANNED_CLIP = ClipShape(512, 768, 121)
PLANNED_MODELS = ("video_lite", "video_pro")


def collect(job: Job) -> dict[str, Any]:
    """Every figure of the job, as JSON values."""
    record, training, plain = job.sample_record, job.training, job.samples[PLAIN]
    return {
        "machine": f"{machine()}; {torch.get_num_threads()} threads, k5kernels {version('k5kernels')}",
        "device": str(job.device),
        "clip": {
            "video": job.video.name,
            "frames": record.frames,
            "height_px": record.height,
            "width_px": record.width,
        },
        "encode_s": job.encode_seconds,
        "reconstruction_psnr_db": job.reconstruction_db,
        "training": {
            "steps": len(training.losses),
            "step_s": training.seconds / len(training.losses),
            "fixed_noise_loss_before": training.before,
            "fixed_noise_loss_after": training.after,
            "losses": training.losses,
        },
        "sampling": {
            "steps": plain.passes // 2,
            "guidance": job.nano.guidance,
            "nabla_thr": job.nano.thr,
            "sta_window_blocks": job.nano.sta,
            "paths": [sampling(job, name) for name in job.samples],
        },
        "training_step_memory_bytes": job.memory,
        "planner": [planned(name) for name in PLANNED_MODELS],
    }


def sampling(job: Job, name: str) -> dict[str, Any]:
    """Time, ratio, density and distance of a path to the plain one."""
    sample, plain, cache = job.samples[name], job.samples[PLAIN], job.paths[name][1]
    passes = [ran for schedule in cache.schedule.values() for ran in schedule] if cache else [True] * sample.passes
    return {
        "path": name,
        "time_s": sample.seconds,
        "speed_up": plain.seconds / sample.seconds,
        "density": sample.density,
        "passes_that_ran_the_blocks": sum(passes),
        "passes": len(passes),
        "psnr_to_full_attention_db": None if sample is plain else psnr(sample.frames, plain.frames),
    }


def planned(name: str) -> dict[str, Any]:
    """The report's two formulas (§7.3) for one clip of 5 s at 512×768 a GPU: predicted, not measured."""
    shape = MODELS[name]
    sizes = (shape.model_dim, shape.time_dim, shape.ff_dim, shape.blocks)
    plain, offloaded = (memory_bytes(*sizes, PLANNED_CLIP.tokens, PLANNED_GPUS, offload) for offload in (False, True))
    return {
        "model": name,
        "h100_step_s": step_time_ms(shape.model_dim, PLANNED_CLIP.pixels, shape.blocks, 1) / 1e3,
        "gpu_memory_bytes": plain,
        "gpu_memory_with_offload_bytes": offloaded,
    }
