"""The forward with long lists first, and with the keys of a head in ranges that fit the L2 cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.compare import assert_near
from bench.gpu.inputs import masks, products, tokens_with_locality
from bench.gpu.run import Run
from k5kernels import block_sparse_attention


def schedules(run: Run) -> None:
    """Checked against the default, to the bit where the sums have the same order."""
    for size in run.sizes:
        if run.device.type != "cuda":
            run.absent("schedules", size, "k5, long lists first", "it needs a GPU")
            continue
        from k5kernels.triton.attention_schedule import Schedule, ranges_in_cache
        from k5kernels.triton.block_sparse_attention import block_sparse_attention as launch

        tokens = tokens_with_locality(size, run.device)
        qkv, layout = (tokens.q, tokens.k, tokens.v), tokens.layout
        l2 = torch.cuda.get_device_properties(run.device).L2_cache_size
        ranges = max(2, ranges_in_cache(layout.tokens, size.head_dim, tokens.k.element_size(), l2))
        chosen = {
            "k5, long lists first": Schedule(longest_first=True),
            f"k5, {ranges} ranges of keys": Schedule(key_ranges=ranges),
            f"k5, {ranges} ranges of keys, long lists first": Schedule(longest_first=True, key_ranges=ranges),
        }
        for name, mask in masks(tokens).items():
            variants: dict[str, Callable[[], Any]] = {"k5": partial(block_sparse_attention, *qkv, mask)}
            starts, most = layout.block_starts(run.device), layout.max_block_tokens
            for variant, schedule in chosen.items():
                variants[variant] = partial(
                    launch, *qkv, mask.offsets, mask.indices, starts, most, size.head_dim**-0.5, schedule
                )
                ours, whole = variants[variant]()[0], variants["k5"]()
                assert_near(ours, whole, f"{name}: {variant}")
                assert schedule.key_ranges > 1 or torch.equal(ours, whole), f"{name}: {variant} changes bits"
            work = dict.fromkeys(variants, products(mask, tokens))
            run.measure("schedules", size, variants, mask=name, density=round(mask.density, 4), work=work)
