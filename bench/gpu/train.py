"""The trainer on a GPU: the losses of a CPU, and what offload costs and saves."""

from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from bench.gpu.block import BLOCKS, MASK, NABLA, config_of
from bench.gpu.inputs import LITE, Size
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.shaped_block import TEXT_TOKENS, shaped_block
from k5kernels.attention import AttentionConfig
from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig
from k5kernels.text_condition import TextCondition
from model.crossdit import CrossDiT

if TYPE_CHECKING:
    from train.loop import Loop

PACKAGES = ("rich", "safetensors", "typer", "webdataset")  # of the trainer, beyond what this benchmark needs
TEXT_DIM = 64
NANO = CrossDiTConfig(64, 32, 256, 1, 2, (16, 24, 24), in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM)
NANO_CLIP = (4, 16, 16)  # tokens
STEPS = 20
LARGEST_LOSS_DIFFERENCE = 1e-2  # of a step's loss, against the CPU's


def train(run: Run) -> None:
    """Losses of 20 steps in bfloat16 with NABLA, checkpointing and offload, against a CPU's in float32; then steps of
    four blocks of Lite's width with offload and without, in time and memory."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    for size in (size for size in run.sizes if size is LITE or run.device.type == "cpu"):
        if missing:
            run.absent("train", size, "all", f"packages that are not installed: {', '.join(missing)}")
            continue
        _compare_losses(run)
        _measure_steps(run, size)


def _compare_losses(run: Run) -> None:
    nabla = AttentionConfig("nabla", NABLA.thr)
    stated = _loop(NANO, NANO_CLIP, torch.device("cpu"), nabla, bf16=False)
    tried = _loop(NANO, NANO_CLIP, run.device, nabla, bf16=True, offload=ActivationOffload(min_bytes=0))
    furthest = max(abs(tried.step() / stated.step() - 1) for _ in range(STEPS))
    assert furthest <= LARGEST_LOSS_DIFFERENCE, f"one of {STEPS} losses differs by {furthest:.1%} from the CPU's"
    variant = "bf16, NABLA, offload, against float32 on the CPU"
    run.keep(Row(f"largest difference of {STEPS} losses", "nano", None, None, variant, "of the loss", furthest))


def _measure_steps(run: Run, size: Size) -> None:
    config = replace(config_of(size), visual_blocks=BLOCKS, in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM)
    kept, away = (
        _loop(config, size.clip, run.device, NABLA, bf16=True, offload=offload)
        for offload in (None, ActivationOffload())
    )
    assert kept.step() == away.step(), "a step with offload has another loss"
    variants = {"kept": kept.step, "offloaded": away.step}
    run.measure(f"training step of {BLOCKS} blocks", size, variants, mask=MASK)
    if run.device.type == "cuda":
        for name, step in variants.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            run.keep(Row(f"memory beyond states of {BLOCKS} blocks", str(size), MASK, None, name, "MiB", peak))


def _loop(
    config: CrossDiTConfig,
    clip: tuple[int, int, int],
    device: torch.device,
    attention: AttentionConfig,
    *,
    bf16: bool,
    offload: ActivationOffload | None = None,
) -> "Loop":
    """The trainer, checkpointing, on one clip of noise of this many tokens."""
    from k5kernels.latents.record import ClipRecord
    from k5kernels.latents.shards import Sample
    from train.crossdit_stage import CrossDiTStage, FlowMatching
    from train.latents import LatentSet
    from train.loop import Loop
    from train.schedule import Schedule

    T, H, W = clip[0], 2 * clip[1], 2 * clip[2]
    latent = torch.randn(config.in_visual_dim, T, H, W, generator=torch.Generator().manual_seed(0)).half()
    data = LatentSet([Sample("noise", latent, ClipRecord(4 * T - 3, 8 * H, 8 * W, Fraction(24), "noise", 0))], None)
    text = torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(1)).to(device)
    condition = TextCondition(text, None, text.mean(1))
    torch.manual_seed(0)
    model = CrossDiT(config)
    for seed, block in enumerate(model.visual_transformer_blocks):
        block.load_state_dict(shaped_block(config, seed).state_dict())
    model.gradient_checkpointing, model.offload = True, offload
    settings = FlowMatching(attention=attention, bf16=bf16)
    stage = CrossDiTStage(model.to(device), data, lambda captions: condition, settings)
    return Loop(stage, Schedule(steps=1 << 20, warmup_steps=2))
