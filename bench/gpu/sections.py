"""What is measured, one function a section, each run in a process of its own by `bench.gpu.runner`.

A variant is timed only after its output was compared with that of another one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import correctness
from bench.gpu.block import block
from bench.gpu.fused import fused
from bench.gpu.graph import graph
from bench.gpu.inputs import STA, THRESHOLDS, Tokens, masks, products, tokens_with_locality
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.gpu.vae import vae
from k5kernels import BlockMask, block_sparse_attention, nabla_attention, nabla_mask

FLEX_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64}
# Two kernels that add bf16 products in different orders.
LARGEST_DIFFERENCE = 2e-2
BACKWARD_PRODUCTS = 3.5  # of forward and backward, against those of the forward: 7 matrix products instead of 2


def attention(run: Run) -> None:
    """Forward over given masks, against dense attention and FlexAttention."""
    for size in run.sizes:
        tokens = tokens_with_locality(size, run.device)
        qkv = (tokens.q, tokens.k, tokens.v)
        whole = _dense_products(tokens)
        for name, mask in masks(tokens).items():
            variants: dict[str, Callable[[], Any]] = {
                "k5": partial(block_sparse_attention, *qkv, mask),
                "dense": partial(dense, *qkv),
            }
            if run.device.type == "cuda":
                variants["flex"] = _flex(qkv, mask)
                assert_near(variants["k5"](), variants["flex"](), f"{name} against FlexAttention")
            if name == "all":
                assert_near(variants["k5"](), variants["dense"](), "all blocks against dense attention")
            kept = products(mask, tokens)
            work = {"k5": kept, "flex": kept, "dense": whole}
            run.measure("attention", size, variants, mask=name, density=round(mask.density, 4), work=work)


def backward(run: Run) -> None:
    """Forward and backward, against dense attention."""
    for size in run.sizes:
        tokens = tokens_with_locality(size, run.device)
        leaves = [x.detach().requires_grad_() for x in (tokens.q, tokens.k, tokens.v)]
        grad = torch.ones_like(tokens.q)
        whole = BACKWARD_PRODUCTS * _dense_products(tokens)
        for name, mask in masks(tokens).items():
            sparse = partial(gradients, partial(block_sparse_attention, mask=mask), leaves, grad)
            full = partial(gradients, dense, leaves, grad)
            if name == "all":
                for ours, theirs in zip(sparse(), full(), strict=True):
                    assert_near(ours, theirs, "gradients over all blocks against dense attention")
            for once, again in zip(sparse(), sparse(), strict=True):
                assert torch.equal(once, again), f"{name}: two backwards differ"
            work = {"k5": BACKWARD_PRODUCTS * products(mask, tokens), "dense": whole}
            variants = {"k5": sparse, "dense": full}
            run.measure("backward", size, variants, mask=name, density=round(mask.density, 4), work=work)


def mask(run: Run) -> None:
    """Building NABLA's mask, and its memory beyond q and k."""
    for size in run.sizes:
        tokens = tokens_with_locality(size, run.device)
        for thr in THRESHOLDS:
            build = partial(nabla_mask, tokens.q, tokens.k, tokens.layout, thr, STA)
            once, again = build(), build()
            assert torch.equal(once.indices, again.indices), "two masks of the same tokens differ"
            density = round(once.density, 4)
            del once, again
            name = f"NABLA {thr} ∪ STA"
            run.measure("mask", size, {"k5": build}, mask=name, density=density)
            if run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                build()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                run.keep(Row("mask", str(size), name, density, "k5", "MiB", peak))


def nabla(run: Run) -> None:
    """`nabla_attention` whole, mask and attention, against dense attention."""
    for size in run.sizes:
        tokens = tokens_with_locality(size, run.device)
        qkv = (tokens.q, tokens.k, tokens.v)
        assert_near(nabla_attention(*qkv, tokens.layout, 1.0), dense(*qkv), "thr 1 against dense attention")
        for thr in THRESHOLDS:
            density = round(nabla_mask(tokens.q, tokens.k, tokens.layout, thr, STA).density, 4)
            variants = {
                "k5": partial(nabla_attention, *qkv, tokens.layout, thr, STA),
                "dense": partial(dense, *qkv),
            }
            run.measure("nabla", size, variants, mask=f"NABLA {thr} ∪ STA", density=density)


def waits(run: Run) -> None:
    """Whether the host waits for the device: a row a step, 1 where it does and 0 where it does not."""
    size = run.sizes[-1]
    tokens = tokens_with_locality(size, run.device)
    leaves = [x.detach().requires_grad_() for x in (tokens.q, tokens.k, tokens.v)]
    given = nabla_mask(tokens.q, tokens.k, tokens.layout, THRESHOLDS[1], STA)
    grad = torch.ones_like(tokens.q)
    steps: dict[str, Callable[[], Any]] = {
        "attention over a given mask": partial(gradients, partial(block_sparse_attention, mask=given), leaves, grad),
        "nabla_mask, whose lists have a length": partial(
            nabla_mask, tokens.q, tokens.k, tokens.layout, THRESHOLDS[1], STA
        ),
        "nabla_attention": partial(
            gradients, partial(nabla_attention, layout=tokens.layout, thr=THRESHOLDS[1], sta=STA), leaves, grad
        ),
    }
    for name, step in steps.items():
        step()  # compiled
        run.keep(Row("waits", str(size), None, None, name, "host waits", float(_waits(run, step))))


def _waits(run: Run, step: Callable[[], Any]) -> bool:
    if run.device.type != "cuda":
        step()
        return False
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's dense attention on a GPU, PyTorch's choice elsewhere."""
    if not q.is_cuda:
        return scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v)


def gradients(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Forward, and the gradients of the leaves."""
    return torch.autograd.grad(function(*leaves), leaves, grad)


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raise AssertionError where two bf16 results differ by more than the order of their sums explains."""
    difference = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert difference <= LARGEST_DIFFERENCE, f"{what}: they differ by {difference:.1e} of their norm"


_COMPILED_FLEX: list[Callable[..., Tensor]] = []


def _flex(qkv: tuple[Tensor, ...], mask: BlockMask) -> Callable[[], Tensor]:
    if not _COMPILED_FLEX:
        _COMPILED_FLEX.append(torch.compile(flex_attention))
    listed = mask.to_flex()
    return lambda: _COMPILED_FLEX[0](*qkv, block_mask=listed, kernel_options=FLEX_OPTIONS)


def _dense_products(tokens: Tokens) -> float:
    _, heads, S, D = tokens.q.shape
    return 4.0 * heads * S * S * D


# In the order of importance, with the seconds each may take.
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "correct": (lambda run: correctness.check(run.device, run.keep), 60),
    "attention": (attention, 120),
    "backward": (backward, 60),
    "mask": (mask, 40),
    "nabla": (nabla, 40),
    "fused": (fused, 90),
    "block": (block, 90),
    "graph": (graph, 40),
    "waits": (waits, 40),
    "vae": (vae, 120),
}
