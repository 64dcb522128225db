"""A Video Lite block against the block of diffusers with the same weights, and a training step of four such blocks."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5TransformerDecoderBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.harness import compare
from bench.shaped_block import BlockInputs, block_inputs, density, shaped_block
from k5kernels import TokenLayout
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.presets import MODEL_SIZES
from model.crossdit import VisualBlock

LITE = MODEL_SIZES["video_lite"]
SHORT, LONG = TokenLayout(((31, 16, 24),)), TokenLayout(((31, 24, 32),))
SMALL = TokenLayout(((3, 16, 24),))
TRAINED = TokenLayout(((8, 16, 24),))  # no more, so that the row takes minutes; with more NABLA gains more
TENTH, FIFTH = AttentionConfig("nabla", thr=0.5), AttentionConfig("nabla", thr=0.66)
BLOCKS = 4
ROUNDS, TRAINING_ROUNDS = 5, 2
# diffusers rounds q and k to bfloat16 after the rotary embedding, in float32 too.
OF_BFLOAT16 = 3e-3
# Of dense attention, where all but a tenth of the blocks, which hold half of the attention, is left out.
OF_SPARSITY = 0.5


def diffusers_block(ours: VisualBlock) -> nn.Module:
    theirs = Kandinsky5TransformerDecoderBlock(LITE.model_dim, LITE.time_dim, LITE.ff_dim, LITE.head_dim)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def run_diffusers(block: nn.Module, inputs: BlockInputs) -> Tensor:
    cos, sin = inputs.rope
    rotations = torch.stack((cos, -sin, sin, cos), dim=-1).view(1, *cos.shape, 2, 2).unsqueeze(2)
    return block(inputs.x, inputs.text, inputs.time, rotations, None)


def relative_difference(out: Tensor, expected: Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def is_near(expected: Tensor, tolerance: float) -> Callable[[Tensor], None]:
    def check(out: Tensor) -> None:
        assert relative_difference(out, expected) <= tolerance, relative_difference(out, expected)

    return check


@torch.no_grad()
def test_forward_dense(benchmark):
    block, inputs = shaped_block(LITE), block_inputs(LITE, SHORT)
    theirs = diffusers_block(block)
    compare(
        benchmark,
        f"S {SHORT.tokens}, float32",
        {
            "ours": lambda: block(inputs.x, inputs.context()),
            "diffusers": lambda: run_diffusers(theirs, inputs),
        },
        is_near(run_diffusers(theirs, inputs), OF_BFLOAT16),
        floors={"diffusers": 1.08},
        rounds=ROUNDS,
    )


@torch.no_grad()
def test_forward_nabla(benchmark):
    block = shaped_block(LITE)
    theirs = diffusers_block(block)
    small = block_inputs(LITE, SMALL)
    every_block = block(small.x, small.context(AttentionConfig("nabla", thr=1.0)))
    is_near(run_diffusers(theirs, small), OF_BFLOAT16)(every_block)
    inputs = block_inputs(LITE, LONG)
    compare(
        benchmark,
        f"S {LONG.tokens}, float32, density {density(block, inputs, TENTH):.1%}",
        {
            "ours": lambda: block(inputs.x, inputs.context(TENTH)),
            "diffusers, dense": lambda: run_diffusers(theirs, inputs),
        },
        is_near(run_diffusers(theirs, inputs), OF_SPARSITY),
        floors={"diffusers, dense": 2.2},
        rounds=ROUNDS,
    )


def training_step(
    blocks: list[VisualBlock], optimizer: torch.optim.Optimizer, inputs: BlockInputs, attention: AttentionConfig
) -> Tensor:
    """Forward with checkpointing, backward and AdamW; returns the gradient of the first block's last weight."""
    x = inputs.x.detach().requires_grad_()
    for block in blocks:
        x = checkpoint(lambda x, block=block: block(x, inputs.context(attention)), x, use_reentrant=False)
    optimizer.zero_grad()
    x.square().mean().backward()
    optimizer.step()
    gradient = blocks[0].feed_forward.out_layer.weight.grad
    assert gradient is not None
    return gradient


def test_training_step(benchmark):
    blocks = [shaped_block(LITE, seed) for seed in range(BLOCKS)]
    # So small a rate that all rounds see the same weights; the work is that of any other.
    optimizer = torch.optim.AdamW([p for block in blocks for p in block.parameters()], lr=1e-12, weight_decay=0)
    small = partial(training_step, blocks, optimizer, block_inputs(LITE, SMALL))
    is_near(small(DENSE).clone(), 1e-3)(small(AttentionConfig("nabla", thr=1.0)))
    inputs = block_inputs(LITE, TRAINED)
    step = partial(training_step, blocks, optimizer, inputs)
    compare(
        benchmark,
        f"{BLOCKS} blocks, S {TRAINED.tokens}, float32, checkpointed, density {density(blocks[0], inputs, FIFTH):.1%}",
        {"NABLA": lambda: step(FIFTH), "dense": lambda: step(DENSE)},
        is_near(step(DENSE).clone(), OF_SPARSITY),
        floors={"dense": 1.46},
        rounds=TRAINING_ROUNDS,
    )
