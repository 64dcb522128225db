"""A visual block whose weights give attention a shape, forward and in a training step, dense and with NABLA."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.gpu.inputs import LITE, STA, THRESHOLDS, Size
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.profile.parts import Part, Parts
from bench.shaped_block import BlockInputs, block_inputs, density, shaped_block
from k5kernels import TokenLayout
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.presets import CrossDiTConfig
from model.crossdit import VisualBlock

THR = THRESHOLDS[1]
NABLA = AttentionConfig("nabla", thr=THR, sta=STA)
MASK = f"NABLA {THR} ∪ STA"
BLOCKS = 4  # of a training step
TIME_DIM, FF_RATIO = 512, 4
# Between NABLA that keeps all blocks and dense attention, both in bfloat16.
LARGEST_DIFFERENCE = 2e-2
MATRIX_PRODUCTS = ("mm", "addmm", "bmm")


def config_of(size: Size) -> CrossDiTConfig:
    width = size.heads * size.head_dim
    return CrossDiTConfig(width, TIME_DIM, FF_RATIO * width, text_blocks=1, visual_blocks=1, axes_dims=size.axes)


def block(run: Run) -> None:
    """Forward, forward and backward of four checkpointed blocks, and the time outside attention and products."""
    for size in (size for size in run.sizes if size is LITE or run.device.type == "cpu"):
        inputs = block_inputs(config_of(size), TokenLayout((size.clip,)), run.device, torch.bfloat16)
        blocks = [shaped_block(config_of(size), seed).to(run.device, torch.bfloat16) for seed in range(BLOCKS)]
        kept = round(density(blocks[0], inputs, NABLA), 4)
        with torch.no_grad():
            _check(blocks[0], inputs)
            forward = {name: partial(_forward, blocks[0], inputs, attention) for name, attention in _VARIANTS.items()}
            if run.device.type == "cuda":
                forward["dense, compiled"] = partial(torch.compile(_forward), blocks[0], inputs, DENSE)
            run.measure("block", size, forward, mask=MASK, density=kept)
            for name, attention in _VARIANTS.items():
                rest = _outside_of_products(run, blocks[0], inputs, attention)
                run.keep(Row("block outside attention and products", str(size), MASK, kept, name, "ms", rest))
        steps = {name: partial(_step, blocks, inputs, attention) for name, attention in _VARIANTS.items()}
        run.measure(f"{BLOCKS} blocks, forward and backward", size, steps, mask=MASK, density=kept)


_VARIANTS = {"k5": NABLA, "dense": DENSE}


def _forward(block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig) -> Tensor:
    return block(inputs.x, inputs.context(attention))


def _check(block: VisualBlock, inputs: BlockInputs) -> None:
    every, dense = (_forward(block, inputs, attention) for attention in (AttentionConfig("nabla", thr=1.0), DENSE))
    difference = ((every.float() - dense.float()).norm() / dense.float().norm()).item()
    assert difference <= LARGEST_DIFFERENCE, f"NABLA over all blocks differs from dense attention by {difference:.1e}"


def _step(blocks: list[VisualBlock], inputs: BlockInputs, attention: AttentionConfig) -> tuple[Tensor, ...]:
    x = start = inputs.x.detach().requires_grad_()
    for block in blocks:
        run: Callable[[Tensor], Any] = partial(_run_block, block, inputs, attention)
        x = checkpoint(run, x, use_reentrant=False)
    weights = [weight for block in blocks for weight in block.parameters()]
    return torch.autograd.grad(x, [start, *weights], torch.ones_like(x))


def _run_block(block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig, x: Tensor) -> Tensor:
    return block(x, inputs.context(attention))


def _outside_of_products(run: Run, block: VisualBlock, inputs: BlockInputs, attention: AttentionConfig) -> float:
    """Milliseconds, each operator alone."""
    with Parts(run.device, inputs.layout) as parts:
        _forward(block, inputs, attention)
    return 1e3 * sum(part.seconds for part in parts.found.values() if not _is_product(part))


def _is_product(part: Part) -> bool:
    name = part.name.partition(".")[2]
    return name in MATRIX_PRODUCTS or "attention" in name
