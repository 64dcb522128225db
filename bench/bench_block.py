"""A Video Lite block against the block of diffusers with the same weights, and a training step of four such blocks."""

from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5TransformerDecoderBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.harness import keep, measure
from bench.shaped_block import BlockInputs, block_inputs, density, shaped_block
from k5kernels import TokenLayout
from k5kernels.attention import DENSE, AttentionConfig
from k5kernels.presets import MODEL_SIZES
from model.crossdit import VisualBlock

LITE = MODEL_SIZES["video_lite"]
SHORT, LONG = TokenLayout(((31, 16, 24),)), TokenLayout(((31, 24, 32),))
SMALL = TokenLayout(((3, 16, 24),))
TRAINED = TokenLayout(((24, 16, 24),))  # a round takes seven minutes
NATIVE = AttentionConfig("native")
TENTH, FIFTH = AttentionConfig("nabla", thr=0.5), AttentionConfig("nabla", thr=0.66)
BLOCKS = 4
ROUNDS = 5  # of calls that take half a minute
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


def near_the_first(tolerance: float) -> Callable[[Tensor], None]:
    """Checks that every output is near the first one it is given: a reference would cost one more call."""
    outputs: list[Tensor] = []

    def check(out: Tensor) -> None:
        outputs.append(out)
        difference = relative_difference(out, outputs[0])
        assert difference <= tolerance, f"expected outputs that differ by {tolerance:g} at most, got {difference:g}"

    return check


@torch.no_grad()
def test_forward_dense():
    block, inputs = shaped_block(LITE), block_inputs(LITE, SHORT)
    theirs = diffusers_block(block)
    row = measure(
        "forward_dense",
        f"S {SHORT.tokens}, float32, engine native",
        {
            "ours": lambda: block(inputs.x, inputs.context(NATIVE)),
            "diffusers": lambda: run_diffusers(theirs, inputs),
        },
        near_the_first(OF_BFLOAT16),
        rounds=ROUNDS,
    )
    keep(row, {"diffusers": 1.08})


@torch.no_grad()
def test_forward_nabla():
    block = shaped_block(LITE)
    theirs = diffusers_block(block)
    small, check = block_inputs(LITE, SMALL), near_the_first(OF_BFLOAT16)
    check(run_diffusers(theirs, small))
    check(block(small.x, small.context(AttentionConfig("nabla", thr=1.0))))
    inputs = block_inputs(LITE, LONG)
    row = measure(
        "forward_nabla",
        f"S {LONG.tokens}, float32, density {density(block, inputs, TENTH):.1%}",
        {
            "ours": lambda: block(inputs.x, inputs.context(TENTH)),
            "diffusers, dense": lambda: run_diffusers(theirs, inputs),
        },
        near_the_first(OF_SPARSITY),
        rounds=ROUNDS,
    )
    keep(row, {"diffusers, dense": 2.2})


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


def test_training_step():
    blocks = [shaped_block(LITE, seed) for seed in range(BLOCKS)]
    # So small a rate that all rounds see the same weights; the work is that of any other.
    optimizer = torch.optim.AdamW([p for block in blocks for p in block.parameters()], lr=1e-12, weight_decay=0)
    small = partial(training_step, blocks, optimizer, block_inputs(LITE, SMALL))
    check = near_the_first(1e-3)
    check(small(DENSE))
    check(small(AttentionConfig("nabla", thr=1.0)))
    inputs = block_inputs(LITE, TRAINED)
    step = partial(training_step, blocks, optimizer, inputs)
    row = measure(
        "training_step",
        f"{BLOCKS} blocks, S {TRAINED.tokens}, float32, checkpointed, density {density(blocks[0], inputs, FIFTH):.1%}",
        {"NABLA": lambda: step(FIFTH), "dense": lambda: step(DENSE)},
        near_the_first(OF_SPARSITY),
        rounds=ROUNDS,
    )
    keep(row, {"dense": 1.46})
