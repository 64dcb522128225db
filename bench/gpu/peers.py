"""Other kernels over 64-token blocks, each where its package can be imported: one that is not there is one row.

What a peer computes is compared with this library's result before either is timed. Its lists are made before: no peer
is charged for a form of the mask that it does not need.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.gpu.compare import BACKWARD_PRODUCTS, assert_near, gradients
from bench.gpu.inputs import masks, products, tokens_with_locality
from bench.gpu.run import Run
from k5kernels import BlockMask, block_sparse_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

FLEX_OPTIONS = {"BLOCK_M": 64, "BLOCK_N": 64}
BLOCK = 64
WORKSPACE = 128 << 20  # bytes, as FlashInfer recommends


@dataclass(frozen=True)
class Peer:
    """module: what must be importable; None for PyTorch's own. prepare: from a mask, of q, k, v [1, h, S, D] bf16 on a
    device, the call to time. has_backward: whether it is differentiable on a GPU."""

    name: str
    module: str | None
    prepare: Callable[[BlockMask, int, int, torch.device], Attend]
    has_backward: bool

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot be run there; None where it can."""
        if self.module is None:
            return None if device.type == "cuda" else "FlexAttention skips blocks only where it is compiled, for a GPU"
        return None if find_spec(self.module) is not None else f"the package {self.module} is not installed"


def against(peer: Peer, run: Run) -> None:
    """Rows of forward, and of forward and backward, beside this library's."""
    for size in run.sizes:
        if reason := peer.why_not(run.device):
            run.absent("peers", size, peer.name, reason)
            continue
        tokens = tokens_with_locality(size, run.device)
        qkv = (tokens.q, tokens.k, tokens.v)
        leaves = [x.detach().requires_grad_() for x in qkv]
        grad = torch.randn(tokens.q.shape, device=run.device, dtype=tokens.q.dtype)
        for name, mask in masks(tokens).items():
            calls: dict[str, Attend] = {
                "k5": partial(block_sparse_attention, mask=mask),
                peer.name: peer.prepare(mask, size.heads, size.head_dim, run.device),
            }
            density = round(mask.density, 4)
            forward = {who: partial(call, *qkv) for who, call in calls.items()}
            assert_near(forward["k5"](), forward[peer.name](), f"{name}: against {peer.name}")
            work = dict.fromkeys(forward, products(mask, tokens))
            run.measure("peers", size, forward, work=work, mask=name, density=density)
            if peer.has_backward and run.device.type == "cuda":
                both = {who: partial(gradients, call, leaves, grad) for who, call in calls.items()}
                for ours, theirs in zip(both["k5"](), both[peer.name](), strict=True):
                    assert_near(ours, theirs, f"{name}: gradients against {peer.name}")
                work = dict.fromkeys(both, BACKWARD_PRODUCTS * products(mask, tokens))
                run.measure("peers, forward and backward", size, both, work=work, mask=name, density=density)


def flex(mask: BlockMask, heads: int, head_dim: int, device: torch.device) -> Attend:
    """Compiled FlexAttention; autotuned, for with its default configuration the backward of 64-token blocks does not
    compile."""
    return partial(_compiled_flex(), block_mask=mask.to_flex(), kernel_options=FLEX_OPTIONS)


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, mode="max-autotune-no-cudagraphs")


def fastvideo(mask: BlockMask, heads: int, head_dim: int, device: torch.device) -> Attend:
    """fastvideo-kernel's video sparse attention: index lists of the key blocks of each query block."""
    module = import_module("fastvideo_kernel.block_sparse_attn")
    dense = mask.to_dense().expand(1, heads, -1, -1)
    sizes = torch.full((dense.shape[-1],), BLOCK, dtype=torch.int32, device=device)
    lists: tuple[Tensor, ...]
    if hasattr(module, "block_sparse_attn_from_indices"):
        attend = signed(
            module.block_sparse_attn_from_indices, ("q", "k", "v", "q2k_idx", "q2k_num", "variable_block_sizes")
        )
        counts = dense.sum(-1, dtype=torch.int32)
        order = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        lists = (order[..., : max(1, int(counts.max()))].contiguous(), counts.contiguous(), sizes)
    else:
        attend = signed(module.block_sparse_attn, ("q", "k", "v", "block_map", "variable_block_sizes"))
        lists = (dense.contiguous(), sizes)
    return lambda q, k, v: attend(q.contiguous(), k.contiguous(), v.contiguous(), *lists)[0]


def flashinfer(mask: BlockMask, heads: int, head_dim: int, device: torch.device) -> Attend:
    """FlashInfer's block-sparse attention with lists of each head's own."""
    wrapper = import_module("flashinfer").VariableBlockSparseAttentionWrapper(
        torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    )
    dense = mask.to_dense()[0].expand(heads, -1, -1).contiguous()
    sizes = torch.full((heads, dense.shape[-1]), BLOCK, dtype=torch.int32, device=device)
    plan = signed(
        wrapper.plan,
        ("block_mask_map", "block_row_sz", "block_col_sz", "num_qo_heads", "num_kv_heads", "head_dim"),
    )
    plan(dense, sizes, sizes, heads, heads, head_dim, q_data_type=torch.bfloat16)
    attend = signed(wrapper.run, ("q", "k", "v"))
    return lambda q, k, v: attend(q[0].contiguous(), k[0].contiguous(), v[0].contiguous())[None]


def signed(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    """The function, if its first parameters have these names; TypeError where a release has others."""
    found = tuple(inspect.signature(function).parameters)[: len(names)]
    if found != names:
        raise TypeError(f"{function.__qualname__}: expected the parameters {', '.join(names)}, got {', '.join(found)}")
    return function


PEERS = (
    Peer("flex", None, flex, has_backward=True),
    Peer("fastvideo", "fastvideo_kernel", fastvideo, has_backward=True),
    Peer("flashinfer", "flashinfer", flashinfer, has_backward=False),
)
