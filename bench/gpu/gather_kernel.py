"""A kernel that loads the key and value tiles of lists by TMA and does nothing with them."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from k5kernels.triton.hopper_attention import descriptor
from k5kernels.triton.hopper_tiles import KEY, TILE
from k5kernels.triton.launch import launch

# By head dimension, tiles of keys and of values in flight: 192 KiB.
STAGES = {64: 12, 128: 6}


def gather_tiles(k: Tensor, v: Tensor, starts: Tensor, lengths: Tensor, entries: Tensor) -> None:
    """k, v: bf16 [B, h, S, D]. starts, lengths: [B, h, lists]: where each list begins in entries, and how many follow.

    entries: int32, key blocks, or entries of `pair_lists`.
    """
    B, h, _, D = k.shape
    done = lengths.new_empty(lengths.shape)
    launch(
        gather_kernel, (lengths.shape[2], B * h),
        descriptor(k), descriptor(v), done, starts.contiguous(), lengths.contiguous(), entries, h,
        D=D, STAGES=STAGES[D], num_warps=1,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["heads"])
def gather_kernel(k, v, done, starts, lengths, entries, heads, D: gl.constexpr, STAGES: gl.constexpr):
    """One warp and one list, STAGES entries in flight; writes how many it loaded."""
    line = gl.program_id(1)
    sample = line // heads
    head = line % heads
    number = line.to(gl.int64) * gl.num_programs(0) + gl.program_id(0)
    n = gl.load(lengths + number).to(gl.int32)
    keys = entries + gl.load(starts + number)
    ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, TILE, D], k.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, TILE, D], v.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    following = gl.load(keys, mask=n > 0, other=0)
    for i in range(n):
        stage = i % STAGES
        bar = full.index(stage)
        row = (following & KEY) * TILE
        following = gl.load(keys + i + 1, mask=i + 1 < n, other=0)
        mbarrier.wait(bar, ((i // STAGES) & 1) ^ 1)  # what was loaded here before has come
        mbarrier.expect(bar, 2 * k.block_type.nbytes)
        tma.async_copy_global_to_shared(k, [sample, head, row, 0], bar, ks.index(stage))
        tma.async_copy_global_to_shared(v, [sample, head, row, 0], bar, vs.index(stage))
    for i in range(gl.maximum(n - STAGES, 0), n):  # no CTA may end while a load is under way
        mbarrier.wait(full.index(i % STAGES), (i // STAGES) & 1)
    gl.store(done + number, n)
