"""The kernels for Hopper that nothing chooses yet, and how fast their lists can be read at all.

A kernel whose warps wait for each other can hang: these sections run in processes with a time limit.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.compare import assert_near
from bench.gpu.inputs import masks, products, tokens_with_locality
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.gpu.timing import interleaved, quartiles
from k5kernels import BlockMask, TokenLayout, block_sparse_attention
from k5kernels.block_mask import dense_to_bits
from k5kernels.ops.hopper_attention import HEAD_DIMS, hopper_attention, why_not

# Full blocks: an even and an odd number of them, so that the last pair has one.
LAYOUTS = (TokenLayout(((2, 16, 24),)), TokenLayout(((1, 24, 24),)))
KINDS = ("half of all", "all", "own block alone", "shared by neighbours", "not shared by neighbours", "first empty")


def hopper(run: Run, pairs: bool) -> None:
    """Checked at small sizes against the Triton kernel, twice to the same bits; then timed beside it."""
    variant = "hopper, pairs" if pairs else "hopper"
    for size in run.sizes:
        if reason := why_not(run.device, torch.bfloat16, size.head_dim, TokenLayout((size.clip,))):
            run.absent("hopper", size, variant, reason)
            continue
        check(run.device, size.head_dim, pairs)
        tokens = tokens_with_locality(size, run.device)
        qkv = (tokens.q, tokens.k, tokens.v)
        for name, mask in masks(tokens).items():
            bits, offsets = bits_of(mask, size.heads)
            variants = {
                "k5": partial(block_sparse_attention, *qkv, mask),
                variant: partial(hopper_attention, *qkv, bits, offsets, tokens.layout, pairs=pairs),
            }
            assert_near(variants[variant](), variants["k5"](), f"{name}: {variant} against the Triton kernel")
            work = dict.fromkeys(variants, products(mask, tokens))
            run.measure("hopper", size, variants, mask=name, density=round(mask.density, 4), work=work)


def check(device: torch.device, head_dim: int, pairs: bool) -> None:
    """Raises AssertionError where a small result is not the Triton kernel's, or differs from one run to the next."""
    assert head_dim in HEAD_DIMS
    for layout in LAYOUTS:
        random = torch.Generator(device).manual_seed(0)
        shape = (2, 3, layout.tokens, head_dim)
        q, k, v = (torch.randn(shape, device=device, generator=random).bfloat16() for _ in range(3))
        for kind in KINDS:
            mask = BlockMask.from_dense(dense(kind, layout, random), layout)
            call = partial(hopper_attention, q, k, v, *bits_of(mask, 3, 2), layout, pairs=pairs)
            ours, again = call(), call()
            assert torch.equal(ours, again), f"{layout}, {kind}: two runs differ"
            assert_near(ours, block_sparse_attention(q, k, v, mask), f"{layout}, {kind}")


def dense(kind: str, layout: TokenLayout, random: torch.Generator) -> Tensor:
    """A small mask of a kind in KINDS: bool [2, 3, N_b, N_b]."""
    N = layout.blocks
    row, column = torch.arange(N, device=random.device)[:, None], torch.arange(N, device=random.device)
    half = torch.rand(2, 3, N, N, device=random.device, generator=random) < 0.5
    found = {
        "half of all": half,
        "all": half | ~half,
        "own block alone": half & False | (row == column),
        "shared by neighbours": half[:, :, torch.arange(N, device=random.device) // 2 * 2],
        "not shared by neighbours": half & (row % 2 == column % 2),
        "first empty": half & (row % 2 == 1),
    }
    return found[kind]


def bits_of(mask: BlockMask, heads: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(bits, offsets) of every sample and head."""
    bits = dense_to_bits(mask.to_dense())
    return bits.expand(batch, heads, -1, -1).contiguous(), mask.offsets.expand(batch, heads, -1).contiguous()


def gather(run: Run) -> None:
    """TB/s of key and value tiles by TMA along the lists without any arithmetic, and the TFLOP/s of attention that
    reads as fast. A kernel near that is held up by the L2 cache; one far from it, by itself.

    Along each list, along the union of two neighbours', and of one tile again and again, which the L2 always has.
    """
    for size in run.sizes:
        if reason := why_not(run.device, torch.bfloat16, size.head_dim, TokenLayout((size.clip,))):
            run.absent("gather", size, "lists", reason)
            continue
        from bench.gpu.gather_kernel import gather_tiles  # needs Gluon, as `why_not` has made sure of
        from k5kernels.triton.pair_lists import bits_to_pairs

        tokens = tokens_with_locality(size, run.device)
        for name, mask in masks(tokens).items():
            bits, offsets = bits_of(mask, size.heads)
            starts, lengths = offsets[..., :-1], offsets.diff(dim=-1)
            # Lists that all heads share stand once; their unions are written once for each head.
            entries, counts = bits_to_pairs(bits, offsets, int(offsets.max()))
            load = partial(gather_tiles, tokens.k, tokens.v)
            variants: dict[str, tuple[Callable[[], Any], Tensor]] = {
                "lists": (partial(load, starts, lengths, mask.indices), lengths),
                "unions of two": (partial(load, starts[..., ::2], counts.sum(-1), entries), counts),
                "one tile": (partial(load, starts, lengths, torch.zeros_like(mask.indices)), lengths),
            }
            work = products(mask, tokens)
            for variant, times in interleaved({who: call for who, (call, _) in variants.items()}).items():
                loaded = int(variants[variant][1].sum()) * 2 * 64 * size.head_dim * tokens.k.element_size()
                lower, median, upper = quartiles(times)
                about = ("gather", str(size), name, round(mask.density, 4), variant)
                for unit, done in (("TB/s", loaded), ("TFLOP/s if attention reads as fast", work)):
                    rate, high, low = (done / ms / 1e9 for ms in (median, lower, upper))
                    run.keep(Row(*about, unit, rate, low, high, len(times)))
