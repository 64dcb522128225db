"""NABLA attention: the block mask, attention over it forward and backward, and both together.

A tenth of the blocks is kept unless a test says otherwise. Dense attention computes something else than sparse
attention, so every variant returns its output together with what that output must be.
"""

from collections.abc import Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from bench.fma_peak import STEPS, FmaPeak
from bench.harness import ROUNDS, compare
from bench.nabla_tokens import tokens_alike_in_blocks
from k5kernels import BlockMask, TokenLayout, block_sparse_attention, nabla_attention, nabla_mask
from k5kernels.attention import AttentionConfig
from k5kernels.ops.nabla_mask import nabla_mask_reference
from model.flow_matching import TIME_UNITS, condition_input
from model.latent_tokens import latent_velocity
from model.nano import CROSSDIT_WEIGHTS
from model.weights import load_crossdit
from train.clips import NAMES
from train.nano_crossdit import held_out_scene

LAYOUT = TokenLayout(((4, 32, 32),))
LONG = TokenLayout(((16, 32, 32),))
BLOCK = 64
DENSITY, THR = 0.1, 0.9
SPREAD = 1.5  # between blocks, so that attention to some is much larger than to others
DENSE, FLEX = "dense SDPA", "compiled flex_attention"
# How many times as fast as each variant the forward must be.
FORWARD_FLOORS: dict[torch.dtype, dict[str, float]] = {torch.float32: {DENSE: 10, FLEX: 1.8}, torch.bfloat16: {FLEX: 3}}


def random_tokens(layout, heads, dim, dtype=torch.float32):
    return [torch.randn(1, heads, layout.tokens, dim).to(dtype) for _ in range(3)]


def placements(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless copies of the tensors at different addresses, in turn: FlexAttention's speed depends on the address."""
    return cycle([(q.clone(), k.clone(), v.clone()) for _ in range(ROUNDS)])


def random_mask(layout, heads, density=DENSITY):
    """A random mask of this density; the diagonal is kept, so that no row is empty."""
    diagonal = torch.eye(layout.blocks, dtype=torch.bool)
    others = (density * layout.blocks - 1) / (layout.blocks - 1)
    return BlockMask.from_dense((torch.rand(1, heads, layout.blocks, layout.blocks) < others) | diagonal, layout)


def compiled_flex_attention():
    """Compiled afresh for one size. After several sizes, torch.compile would make it general, or stop compiling it."""
    torch._dynamo.reset()
    return torch.compile(flex_attention)


def check(output_and_truth):
    output, truth = output_and_truth
    tolerance = max(4 * torch.finfo(output.dtype).eps, 1e-5) * truth.abs().max().item()
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=tolerance)


def check_all(outputs_and_truths):
    for pair in zip(*outputs_and_truths, strict=True):
        check(pair)


def sizes(layout, heads, dim, density):
    return f"S {layout.tokens}, {heads} heads of {dim}, density {density:.0%}"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("layout", [LAYOUT, LONG], ids=["S 4096", "S 16384"])
def test_attention(benchmark, dtype, layout, dim):
    heads = 4 * LAYOUT.tokens * 128 // (layout.tokens * dim)
    q, k, v = random_tokens(layout, heads, dim, dtype)
    mask = random_mask(layout, heads)
    in_float64 = (q.double(), k.double(), v.double())
    sparse, dense = block_sparse_attention(*in_float64, mask, layout), scaled_dot_product_attention(*in_float64)
    flex, flex_mask = compiled_flex_attention(), mask.to_flex()
    ours_at, dense_at, flex_at = (placements(q, k, v) for _ in range(3))
    compare(
        benchmark,
        sizes(layout, heads, dim, mask.density),
        {
            "ours": lambda: (block_sparse_attention(*next(ours_at), mask, layout), sparse),
            DENSE: lambda: (scaled_dot_product_attention(*next(dense_at)), dense),
            FLEX: lambda: (flex(*next(flex_at), block_mask=flex_mask), sparse),
        },
        check,
        floors=FORWARD_FLOORS[dtype],
    )


@pytest.mark.parametrize("dim", [64, 128])
def test_rate_on_kept_blocks(benchmark, dim):
    """GFLOP/s of both products over the kept blocks, beside a matrix product and the processor's limit."""
    heads, side = 1024 // dim, 4096
    matrix_product = f"torch.mm {side}³"
    fma_peak = FmaPeak()
    counts = torch.full_like(fma_peak(), STEPS, dtype=torch.float64)
    q, k, v = random_tokens(LAYOUT, heads, dim)
    mask = random_mask(LAYOUT, heads)
    truth = block_sparse_attention(q.double(), k.double(), v.double(), mask, LAYOUT)
    flex, flex_mask = compiled_flex_attention(), mask.to_flex()
    left, right = torch.randn(side, side), torch.randn(side, side)
    product = left.double() @ right.double()
    kept = 4 * BLOCK**2 * dim * mask.indices.numel()
    compare(
        benchmark,
        sizes(LAYOUT, heads, dim, mask.density),
        {
            "ours": lambda: (block_sparse_attention(q, k, v, mask, LAYOUT), truth),
            matrix_product: lambda: (left @ right, product),
            FLEX: lambda: (flex(q, k, v, block_mask=flex_mask), truth),
            "FMA peak": lambda: (fma_peak(), counts),
        },
        check,
        operations={"ours": kept, matrix_product: 2 * side**3, FLEX: kept, "FMA peak": fma_peak.operations},
        floors={matrix_product: 0.85},
    )


def test_attention_at_full_density(benchmark):
    heads, dim = 2, 64
    q, k, v = random_tokens(LAYOUT, heads, dim)
    mask = random_mask(LAYOUT, heads, density=1.0)
    truth = scaled_dot_product_attention(q.double(), k.double(), v.double())
    compare(
        benchmark,
        sizes(LAYOUT, heads, dim, mask.density),
        {
            "ours": lambda: (block_sparse_attention(q, k, v, mask, LAYOUT), truth),
            DENSE: lambda: (scaled_dot_product_attention(q, k, v), truth),
        },
        check,
        floors={DENSE: 1},
    )


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(LAYOUT, torch.float32), (LAYOUT, torch.bfloat16), (LONG, torch.float32)],
    ids=["S 4096-float32", "S 4096-bfloat16", "S 16384-float32"],
)
def test_attention_forward_and_backward(benchmark, dtype, layout, dim):
    heads = max(1, 256 * LAYOUT.tokens // (layout.tokens * dim))
    tokens = [x.requires_grad_() for x in random_tokens(layout, heads, dim, dtype)]
    mask = random_mask(layout, heads)
    grad = torch.randn(tokens[0].shape).to(dtype)

    def sparse(q, k, v):
        return block_sparse_attention(q, k, v, mask, layout)

    def step(function, inputs, grad):
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    in_float64 = [x.detach().double().requires_grad_() for x in tokens]
    sparse_truth, dense_truth = (step(f, in_float64, grad.double()) for f in (sparse, scaled_dot_product_attention))
    compare(
        benchmark,
        sizes(layout, heads, dim, mask.density),
        {
            "ours": lambda: (step(sparse, tokens, grad), sparse_truth),
            DENSE: lambda: (step(scaled_dot_product_attention, tokens, grad), dense_truth),
        },
        check_all,
        floors={DENSE: 8} if dtype == torch.float32 else None,
    )


@pytest.mark.parametrize(("frames", "floor"), [(12, 4), (48, 12)], ids=["192 blocks", "768 blocks"])
def test_mask(benchmark, frames, floor):
    """The reference is the construction by sort, cumulative sum and scatter."""
    heads, layout = 24, TokenLayout(((frames, 32, 32),))
    q, k, _ = tokens_alike_in_blocks(layout, heads, 64, SPREAD)
    starts = (layout.block_starts(), layout.clip_block_starts())
    arguments = (q, k, *starts, layout.max_block_tokens, layout.max_clip_blocks, THR, None, None)
    expected = BlockMask(*nabla_mask_reference(*arguments), layout)
    kept = expected.to_dense()

    def check_lists(lists):
        # Logits that differ in the last bit may swap two blocks at the threshold.
        offsets, indices = lists
        assert (BlockMask(offsets, indices, layout).to_dense() != kept).float().mean() < 1e-5

    compare(
        benchmark,
        f"{layout.blocks} blocks, {heads} heads, thr {THR}, density {expected.density:.0%}",
        {
            "ours": lambda: torch.ops.k5.nabla_mask(*arguments),
            "by sort": lambda: nabla_mask_reference(*arguments),
        },
        check_lists,
        floors={"by sort": floor},
    )


def compare_whole(benchmark, q, k, v, layout, thr):
    """Mask and attention together, beside dense attention."""
    mask = nabla_mask(q, k, layout, thr)
    in_float64 = (q.double(), k.double(), v.double())
    sparse, dense = block_sparse_attention(*in_float64, mask, layout), scaled_dot_product_attention(*in_float64)
    compare(
        benchmark,
        f"{sizes(layout, q.shape[1], q.shape[3], mask.density)}, thr {thr}",
        {
            "ours": lambda: (nabla_attention(q, k, v, layout, thr), sparse),
            DENSE: lambda: (scaled_dot_product_attention(q, k, v), dense),
        },
        check,
    )


def test_nabla_attention(benchmark):
    q, k, v = tokens_alike_in_blocks(LAYOUT, 4, 64, SPREAD)
    compare_whole(benchmark, q, k, v, LAYOUT, THR)


class Captured(TorchDispatchMode):
    """Keeps the q, k and v of the attention that runs inside it."""

    def __init__(self):
        super().__init__()
        self.tokens = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.k5.block_sparse_attention.default:
            self.tokens.append(args[:3])
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def tokens_of_nano(layout):
    """q, k and v of the middle block of the shipped model, half-way through the noise of a held-out clip."""
    scene, model = held_out_scene(NAMES[0], torch.device("cpu")), load_crossdit(CROSSDIT_WEIGHTS)
    noisy = 0.5 * (scene.latent + torch.randn(scene.latent.shape))
    with Captured() as captured:
        attention = AttentionConfig("nabla", THR, None)
        latent_velocity(
            model, condition_input(noisy, None), torch.tensor([TIME_UNITS / 2]), scene.text, attention=attention
        )
    q, k, v = captured.tokens[model.config.visual_blocks // 2]
    assert q.shape[2] == layout.tokens
    return q, k, v


def test_nabla_attention_on_tokens_of_nano(benchmark):
    layout = TokenLayout(((7, 16, 24),))
    q, k, v = tokens_of_nano(layout)
    compare_whole(benchmark, q, k, v, layout, THR)
