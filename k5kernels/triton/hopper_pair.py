"""Block-sparse attention for Hopper (sm_90) in Gluon, forward: two neighbouring query blocks share their key blocks.

A consumer warpgroup each, and one producer warp that streams the union of the two lists (`pair_lists`) through a ring
of STAGES key and value tiles in shared memory. Entries that both read take the stages in turn; a private one takes a
stage of its reader's half. So a consumer reads no list: its stages follow from the three counts, and it never waits for
a tile that it does not use.

Barriers. q_full[2], k_full[stage], v_full[stage]: one arrival, the producer's expect, and the bytes. empty[stage]: two
arrivals, one a consumer, after its product with the stage's values; K was read long before. For a private entry the
producer arrives in the other's place right after it has started the loads: that cannot be early, for only the producer
could use the phase which it completes. Everybody who waits on a stage sees all of its uses, the shared ones first and
its owner's afterwards, and tracks the phase with a bit a stage: to who skips a use a parity is ambiguous.

A consumer holds the stage of its last entry, whose values are still to be multiplied, while it waits for its next one;
its first private entry therefore avoids the stage of the last shared one. STAGES is even and at least 4: two deadlock.
tests/ops/test_hopper_attention.py runs this protocol in random orders.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from k5kernels.triton.hopper_tiles import (
    KEY,
    LN_2,
    READERS,
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


@gluon.jit
def first_private(shared, STAGES: gl.constexpr, ME: gl.constexpr):
    """Which of its half of the stages consumer ME's first private entry takes: not that of the last shared one."""
    HALF: gl.constexpr = STAGES // 2
    last = (shared - 1) % STAGES - ME * HALF
    return gl.where((last >= 0) & (last < HALF), (last + 1) % HALF, 0)


@gluon.jit
def stage_of(j, shared, first, STAGES: gl.constexpr, ME: gl.constexpr):
    """The stage of consumer ME's j-th entry: all stages in turn while entries are shared, then those of its half."""
    HALF: gl.constexpr = STAGES // 2
    return gl.where(j < shared, j % STAGES, ME * HALF + (j - shared + first) % HALF)


@gluon.jit
def consume(
    tensors, tiles, bars, where, pair, counts, scale,
    D: gl.constexpr, STAGES: gl.constexpr, SLOT: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One query block of the pair: entries j = 0 .. of its own, each released when its values have been multiplied."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    out, lse, tokens = tensors
    q_tiles, ks, vs = tiles
    q_full, k_full, v_full, empty = bars
    shared, first_only, second_only = counts
    block = 2 * pair + ME
    qs = q_tiles.index(2 * SLOT + ME)
    n = shared + first_only if ME == 0 else shared + second_only
    if n > 0:
        mbarrier.wait(q_full.index(2 * SLOT + ME), 0)
        first = first_private(shared, STAGES, ME)
        stage = stage_of(0, shared, first, STAGES, ME)
        old = SLOT * STAGES + stage
        phases = 1 << stage  # a bit a stage: the phase it is in, as far as this consumer has seen
        mbarrier.wait(k_full.index(old), 0)
        st = scores(qs, ks.index(old), D, SCORES)
        s = warpgroup_mma_wait(0, deps=(st,))
        top, total, rescale, weights = first_softmax(s, scale, WEIGHTS)
        acc = gl.zeros([TILE, D], gl.float32, layout=OUT)
        mbarrier.wait(v_full.index(old), 0)
        for j in range(1, n):
            stage = stage_of(j, shared, first, STAGES, ME)
            cur = SLOT * STAGES + stage
            phase = (phases >> stage) & 1
            phases = phases ^ (1 << stage)
            mbarrier.wait(k_full.index(cur), phase)
            st = scores(qs, ks.index(cur), D, SCORES)
            acc = acc * gl.convert_layout(rescale, OUT_ROWS)[:, None]
            pv = warpgroup_mma(weights, matrix(vs.index(old), D), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(st,))
            top, total, rescale, next_weights = softmax(s, scale, top, total, WEIGHTS)
            # For the next step. Here it ends a basic block: else ptxas moves the softmax behind the wait below.
            mbarrier.wait(v_full.index(cur), phase)
            acc = warpgroup_mma_wait(0, deps=(pv,))
            mbarrier.arrive(empty.index(old), count=1)
            weights = next_weights
            old = cur
        acc = acc * gl.convert_layout(rescale, OUT_ROWS)[:, None]
        pv = warpgroup_mma(weights, matrix(vs.index(old), D), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(pv,))
        mbarrier.arrive(empty.index(old), count=1)
        acc = acc / gl.convert_layout(total, OUT_ROWS)[:, None]
        store_block(out, lse, qs, acc, (top + gl.log2(total)) * LN_2, where, block, tokens, D, ROWS)
    else:
        store_nothing(out, lse, qs, where, block, tokens, D, OUT, ROWS)


@gluon.jit
def produce(descs, tiles, bars, where, pair, counts, entries, STAGES: gl.constexpr, SLOT: gl.constexpr):
    """One warp: the queries, then key and value tiles of the union into the ring, in order."""
    q, k, v = descs
    q_tiles, ks, vs = tiles
    q_full, k_full, v_full, empty = bars
    sample, head, _ = where
    shared, first_only, second_only = counts
    fetch(q, sample, head, 2 * pair, q_full.index(2 * SLOT), q_tiles.index(2 * SLOT), shared + first_only > 0)
    second = 2 * SLOT + 1
    fetch(q, sample, head, 2 * pair + 1, q_full.index(second), q_tiles.index(second), shared + second_only > 0)
    HALF: gl.constexpr = STAGES // 2
    next_first = first_private(shared, STAGES, 0)
    next_second = first_private(shared, STAGES, 1)
    phases = (1 << STAGES) - 1  # the wait for the phase before its first is passed at once
    n = shared + first_only + second_only
    entry = gl.load(entries, mask=n > 0, other=0)
    for i in range(n):
        following = gl.load(entries + i + 1, mask=i + 1 < n, other=0)
        readers = entry >> READERS
        stage = gl.where(readers == 3, i % STAGES, gl.where(readers == 1, next_first, HALF + next_second))
        next_first = gl.where(readers == 1, (next_first + 1) % HALF, next_first)
        next_second = gl.where(readers == 2, (next_second + 1) % HALF, next_second)
        here = SLOT * STAGES + stage
        mbarrier.wait(empty.index(here), (phases >> stage) & 1)
        phases = phases ^ (1 << stage)
        fetch(k, sample, head, entry & KEY, k_full.index(here), ks.index(here), True)
        fetch(v, sample, head, entry & KEY, v_full.index(here), vs.index(here), True)
        mbarrier.arrive(empty.index(here), count=1, pred=readers != 3)
        entry = following


@gluon.jit
def pair_of(offsets, counts, line, pair, blocks):
    """((entries of both, of the first, of the second), where they start); nothing beyond the last pair."""
    pairs = (blocks + 1) // 2
    there = pair < pairs
    found = counts + (line.to(gl.int64) * pairs + pair) * 3
    shared = gl.load(found, mask=there, other=0)
    first_only = gl.load(found + 1, mask=there, other=0)
    second_only = gl.load(found + 2, mask=there, other=0)
    start = gl.load(offsets + (line.to(gl.int64) * (blocks + 1) + 2 * pair), mask=there, other=0)
    return (shared, first_only, second_only), start


@gluon.jit(do_not_specialize=SIZES)
def hopper_pair_kernel(
    q, k, v, out, lse, offsets, entries, counts, heads, tokens, blocks, scale,
    D: gl.constexpr, PAIRS: gl.constexpr, STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Query blocks 2i and 2i + 1 over the union of their lists; PAIRS (1 or 2) such in a CTA.

    scale: times log2(e). A second pair has a ring and a producer warp of its own. CONSUMER_REGISTERS: of every consumer
    but the first, which gets what the launch's maxnreg leaves.
    """
    pair = gl.program_id(0) * PAIRS
    line = gl.program_id(1)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [2 * PAIRS, 1, 1, TILE, D], q.layout)
    ks = gl.allocate_shared_memory(gl.bfloat16, [PAIRS * STAGES, 1, 1, TILE, D], k.layout)
    vs = gl.allocate_shared_memory(gl.bfloat16, [PAIRS * STAGES, 1, 1, TILE, D], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * PAIRS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [PAIRS * STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [PAIRS * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PAIRS * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * PAIRS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(PAIRS * STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    tiles = (q_tiles, ks, vs)
    bars = (q_full, k_full, v_full, empty)
    tensors = (out, lse, tokens)
    descs = (q, k, v)
    where = (line // heads, line % heads, line)
    number, start = pair_of(offsets, counts, line, pair, blocks)
    if PAIRS == 1:
        gl.warp_specialize(
            [
                (consume, (tensors, tiles, bars, where, pair, number, scale, D, STAGES, 0, 0)),
                (consume, (tensors, tiles, bars, where, pair, number, scale, D, STAGES, 0, 1)),
                (produce, (descs, tiles, bars, where, pair, number, entries + start, STAGES, 0)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        pair2 = pair + 1
        number2, start2 = pair_of(offsets, counts, line, pair2, blocks)
        gl.warp_specialize(
            [
                (consume, (tensors, tiles, bars, where, pair, number, scale, D, STAGES, 0, 0)),
                (consume, (tensors, tiles, bars, where, pair, number, scale, D, STAGES, 0, 1)),
                (consume, (tensors, tiles, bars, where, pair2, number2, scale, D, STAGES, 1, 0)),
                (consume, (tensors, tiles, bars, where, pair2, number2, scale, D, STAGES, 1, 1)),
                (produce, (descs, tiles, bars, where, pair, number, entries + start, STAGES, 0)),
                (produce, (descs, tiles, bars, where, pair2, number2, entries + start2, STAGES, 1)),
            ],
            [4, 4, 4, 1, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
        )
