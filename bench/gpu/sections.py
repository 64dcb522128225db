"""What is measured, one function a section, each run in a process of its own by `bench.gpu.runner`.

A variant is timed only after its output was compared with that of another one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu import correctness
from bench.gpu.block import block
from bench.gpu.compare import BACKWARD_PRODUCTS, assert_near, gradients
from bench.gpu.dropin import dropin
from bench.gpu.fused import fused
from bench.gpu.graph import graph
from bench.gpu.hopper import gather, hopper
from bench.gpu.inputs import STA, THRESHOLDS, Tokens, masks, products, tokens_with_locality
from bench.gpu.peers import PEERS, against, flex
from bench.gpu.released_mask import Lists, kept_map, released_mask
from bench.gpu.results import Row
from bench.gpu.run import Run
from bench.gpu.schedules import schedules
from bench.gpu.train import train
from bench.gpu.vae import vae
from k5kernels import block_sparse_attention, nabla_attention, nabla_mask, sta_mask

# Of the blocks of a map in float32, those that another order of sums may move over the threshold.
LARGEST_OTHER = 1e-4


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
                variants["flex"] = partial(flex(mask, size.heads, size.head_dim, run.device), *qkv)
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
            released, theirs = released_mask()
            sta = sta_mask(tokens.layout, STA, run.device).to_dense()
            _check_released(theirs, tokens, sta, thr)
            whole = partial(theirs, tokens.q.transpose(1, 2), tokens.k.transpose(1, 2), sta, thr)
            variants: dict[str, Callable[[], Any]] = {"k5": build, released: whole}
            run.measure("mask", size, variants, mask=name, density=density)
            for variant, call in variants.items():
                if run.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    call()
                    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
                    run.keep(Row("mask", str(size), name, density, variant, "MiB", peak))


def _check_released(theirs: Callable[..., Lists], tokens: Tokens, sta: Tensor, thr: float) -> None:
    """The masks of one head's tokens in float32 are the same but for rounding; in bf16 theirs is rounded."""
    q, k = (x[:, :1].float() for x in (tokens.q, tokens.k))
    ours = nabla_mask(q, k, tokens.layout, thr, STA).to_dense()
    other = (ours != kept_map(theirs(q.transpose(1, 2), k.transpose(1, 2), sta, thr))).float().mean().item()
    assert other <= LARGEST_OTHER, f"NABLA {thr}: {other:.1e} of the blocks are not as in the released mask"


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
    "dropin": (dropin, 120),
    "graph": (graph, 40),
    "waits": (waits, 40),
    "vae": (vae, 120),
    "train": (train, 240),
    "schedules": (schedules, 60),
    # Kernels that have not run: each in a process of its own, so that one that hangs costs its seconds.
    "hopper": (partial(hopper, pairs=False), 60),
    "hopper pairs": (partial(hopper, pairs=True), 60),
    "gather": (gather, 40),
    **{f"peer {peer.name}": (partial(against, peer), 240) for peer in PEERS},
}
