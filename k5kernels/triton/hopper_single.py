"""Block-sparse attention for Hopper (sm_90) in Gluon, forward: one warpgroup a query block, several CTAs an SM."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from k5kernels.triton.hopper_tiles import (
    LN_2,
    SIZES,
    TILE,
    fetch,
    first_softmax,
    matrix,
    scores,
    softmax,
    store_block,
    store_nothing,
)


@gluon.jit(do_not_specialize=SIZES)
def hopper_single_kernel(
    q, k, v, out, lse, offsets, indices, heads, tokens, blocks, scale,
    D: gl.constexpr, KEY_TILES: gl.constexpr, VALUE_TILES: gl.constexpr,
):  # fmt: skip
    """One query block over its list. scale: times log2(e). KEY_TILES, VALUE_TILES: of each in shared memory.

    The scores of the next key block are computed beside the products with the values of the last one.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    block = gl.program_id(0)
    line = gl.program_id(1)
    where = (line // heads, line % heads, line)
    sample, head, _ = where
    at = offsets + (line.to(gl.int64) * (blocks + 1) + block)
    start = gl.load(at)
    n = (gl.load(at + 1) - start).to(gl.int32)
    keys = indices + start
    qs = gl.allocate_shared_memory(gl.bfloat16, [1, 1, TILE, D], q.layout)
    ks = gl.allocate_shared_memory(gl.bfloat16, [KEY_TILES, 1, 1, TILE, D], k.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [VALUE_TILES, 1, 1, TILE, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [KEY_TILES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [VALUE_TILES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(KEY_TILES):
        mbarrier.init(k_full.index(i), count=1)
    for i in gl.static_range(VALUE_TILES):
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    if n > 0:
        fetch(q, sample, head, block, q_full, qs, True)
        for i in gl.static_range(KEY_TILES):
            fetch(k, sample, head, gl.load(keys + i, mask=i < n, other=0), k_full.index(i), ks.index(i), i < n)
        for i in gl.static_range(VALUE_TILES):
            fetch(v, sample, head, gl.load(keys + i, mask=i < n, other=0), v_full.index(i), vs.index(i), i < n)
        mbarrier.wait(q_full, 0)
        next_key = gl.load(keys + KEY_TILES, mask=n > KEY_TILES, other=0)
        mbarrier.wait(k_full.index(0), 0)
        st = scores(qs, ks.index(0), D, SCORES)
        s = warpgroup_mma_wait(0, deps=(st,))
        fetch(k, sample, head, next_key, k_full.index(0), ks.index(0), n > KEY_TILES)
        top, total, rescale, weights = first_softmax(s, scale, WEIGHTS)
        acc = gl.zeros([TILE, D], gl.float32, layout=OUT)
        mbarrier.wait(v_full.index(0), 0)
        for j in range(1, n):
            next_key = gl.load(keys + j + KEY_TILES, mask=j + KEY_TILES < n, other=0)
            next_value = gl.load(keys + j - 1 + VALUE_TILES, mask=j - 1 + VALUE_TILES < n, other=0)
            kb = j % KEY_TILES
            vb = (j - 1) % VALUE_TILES
            mbarrier.wait(k_full.index(kb), (j // KEY_TILES) & 1)
            st = scores(qs, ks.index(kb), D, SCORES)
            acc = acc * gl.convert_layout(rescale, OUT_ROWS)[:, None]
            pv = warpgroup_mma(weights, matrix(vs.index(vb), D), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(st,))
            # The barrier in expect comes after every warp's wait: nobody reads the tile that this load overwrites.
            fetch(k, sample, head, next_key, k_full.index(kb), ks.index(kb), j + KEY_TILES < n)
            if KEY_TILES == 1:  # long complete: only keeps ptxas from moving the load behind the softmax
                mbarrier.wait(v_full.index(vb), ((j - 1) // VALUE_TILES) & 1)
            top, total, rescale, next_weights = softmax(s, scale, top, total, WEIGHTS)
            # For the next step. Here it ends a basic block: else ptxas moves the softmax behind the wait below.
            mbarrier.wait(v_full.index(j % VALUE_TILES), (j // VALUE_TILES) & 1)
            acc = warpgroup_mma_wait(0, deps=(pv,))
            fetch(v, sample, head, next_value, v_full.index(vb), vs.index(vb), j - 1 + VALUE_TILES < n)
            weights = next_weights
        acc = acc * gl.convert_layout(rescale, OUT_ROWS)[:, None]
        pv = warpgroup_mma(weights, matrix(vs.index((n - 1) % VALUE_TILES), D), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(pv,))
        acc = acc / gl.convert_layout(total, OUT_ROWS)[:, None]
        store_block(out, lse, qs, acc, (top + gl.log2(total)) * LN_2, where, block, tokens, D, ROWS)
    else:
        store_nothing(out, lse, qs, where, block, tokens, D, OUT, ROWS)
