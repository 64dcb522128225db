"""The trainer on a GPU: the losses of a CPU, and what offload costs and saves."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.gpu.block import BLOCKS, MASK, NABLA, config_of
from bench.gpu.inputs import LITE, Size
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.shaped_block import block_inputs, shaped_block
from k5kernels import TokenLayout
from k5kernels.attention import AttentionConfig
from k5kernels.offload import ActivationOffload
from k5kernels.presets import CrossDiTConfig

PACKAGES = ("rich", "safetensors", "typer", "webdataset")  # of the trainer, beyond what this benchmark needs
TEXT_DIM = 64
NANO = CrossDiTConfig(64, 32, 256, 1, 2, (16, 24, 24), in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM)
NANO_CLIP = (4, 16, 16)  # tokens
STEPS = 20
DEEP = 32  # blocks, as Lite has
LARGEST_LOSS_DIFFERENCE = 1e-2  # of a step's loss, against the CPU's


def train(run: Run) -> None:
    """Losses of 20 steps in bfloat16 with NABLA, checkpointing and offload, against a CPU's in float32; then steps of
    four blocks of Lite's width with offload and without, and passes through as many blocks as Lite has, in time and
    memory."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    for size in (size for size in run.sizes if size is LITE or run.device.type == "cpu"):
        if missing:
            run.absent("train", size, "all", f"packages that are not installed: {', '.join(missing)}")
            continue
        _compare_losses(run)
        _measure_steps(run, size)
        _measure_passes(run, size)


def _compare_losses(run: Run) -> None:
    from bench.shaped_training import shaped_loop

    nabla = AttentionConfig("nabla", NABLA.thr)
    stated = shaped_loop(NANO, NANO_CLIP, torch.device("cpu"), nabla, bf16=False)
    tried = shaped_loop(NANO, NANO_CLIP, run.device, nabla, bf16=True, offload=ActivationOffload(min_bytes=0))
    furthest = max(abs(tried.step() / stated.step() - 1) for _ in range(STEPS))
    assert furthest <= LARGEST_LOSS_DIFFERENCE, f"one of {STEPS} losses differs by {furthest:.1%} from the CPU's"
    variant = "bf16, NABLA, offload, against float32 on the CPU"
    run.keep(Row(f"largest difference of {STEPS} losses", "nano", None, None, variant, "of the loss", furthest))


def _measure_steps(run: Run, size: Size) -> None:
    from bench.shaped_training import shaped_loop

    config = replace(config_of(size), visual_blocks=BLOCKS, in_text_dim=TEXT_DIM, in_text_dim2=TEXT_DIM)
    kept, away = (
        shaped_loop(config, size.clip, run.device, NABLA, bf16=True, offload=offload)
        for offload in (None, ActivationOffload())
    )
    assert kept.step() == away.step(), "a step with offload has another loss"
    variants = {"kept": kept.step, "offloaded": away.step}
    run.measure(f"training step of {BLOCKS} blocks", size, variants, mask=MASK)
    _measure_memory(run, size, f"memory beyond states of {BLOCKS} blocks", variants)


def _measure_passes(run: Run, size: Size) -> None:
    """Forward and backward through the depth of Lite. All blocks have the same weights, so that states and gradients,
    which offload leaves where they are, take no more than one block's."""
    block = shaped_block(config_of(size)).to(run.device, torch.bfloat16)
    inputs = block_inputs(config_of(size), TokenLayout((size.clip,)), run.device, torch.bfloat16)
    context = inputs.context(NABLA)
    offload, depth = ActivationOffload(), DEEP if run.device.type == "cuda" else BLOCKS

    def passes(around: AbstractContextManager) -> Tensor:
        x = inputs.x.detach().requires_grad_()
        out = x
        with around:
            for _ in range(depth):
                out = checkpoint(lambda tokens: block(tokens, context), out, use_reentrant=False)
        block.zero_grad(set_to_none=False)
        out.float().square().mean().backward()
        assert x.grad is not None
        return x.grad

    variants = {"kept": lambda: passes(nullcontext()), "offloaded": lambda: passes(offload)}
    assert torch.equal(variants["kept"](), variants["offloaded"]()), "gradients with offload differ"
    run.measure(f"{depth} blocks of equal weights, forward and backward", size, variants, mask=MASK)
    _measure_memory(run, size, f"memory beyond weights of {depth} blocks of equal weights", variants)


def _measure_memory(run: Run, size: Size, section: str, variants: Mapping[str, Callable[[], Any]]) -> None:
    if run.device.type != "cuda":
        return
    for name, step in variants.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        run.keep(Row(section, str(size), MASK, None, name, "MiB", peak))
