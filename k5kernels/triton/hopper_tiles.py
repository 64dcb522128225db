"""What the Hopper kernels of attention share: tiles by TMA, scores and softmax of a tile, and the output's store.

Gluon's arrive and expect are a barrier among the warps of a partition and one arrival by its first thread, so arrivals
are counted in partitions; a wait is every thread's. Tiles are written by TMA and read by wgmma, both in the async
proxy: no fence stands between them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from k5kernels.triton.pair_lists import FIRST_READS, READERS_BIT

BLOCK = 64  # tokens of a block, rows of every tile
TILE = gl.constexpr(BLOCK)
# Of an entry of `pair_lists`: where its readers stand, and its key block.
READERS = gl.constexpr(READERS_BIT)
KEY = gl.constexpr(FIRST_READS - 1)
LN_2 = gl.constexpr(0.6931471805599453)
# Nothing is gained by compiling for particular values of these.
SIZES = ["heads", "tokens", "blocks"]


@gluon.jit
def fetch(desc, sample, head, block, bar, dst, pred):
    """One tile by TMA: bar completes its phase when all of it is there. All warps of the partition meet in expect."""
    mbarrier.expect(bar, desc.block_type.nbytes, pred=pred)
    tma.async_copy_global_to_shared(desc, [sample, head, block * TILE, 0], bar, dst, pred=pred)


@gluon.jit
def matrix(tile, D: gl.constexpr):
    """[1, 1, 64, D] in shared memory as [64, D]."""
    return tile.reshape((TILE, D))


@gluon.jit
def scores(queries, k_tile, D: gl.constexpr, SCORES: gl.constexpr):
    """Start q·kT of two tiles in shared memory."""
    zero = gl.zeros([TILE, TILE], gl.float32, layout=SCORES)
    keys = matrix(k_tile, D).permute((1, 0))
    return warpgroup_mma(matrix(queries, D), keys, zero, use_acc=False, is_async=True)


@gluon.jit
def first_softmax(s, scale, WEIGHTS: gl.constexpr):
    """(row maxima, row sums, factor for what was added before, weights) of the first tile of scores."""
    top = gl.max(s, axis=1) * scale
    p = gl.exp2(s * scale - top[:, None])
    rescale = gl.full([TILE], 1.0, gl.float32, layout=top.type.layout)
    return top, gl.sum(p, axis=1), rescale, gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)


@gluon.jit
def softmax(s, scale, top, total, WEIGHTS: gl.constexpr):
    """The same of a further tile."""
    new_top = gl.maximum(top, gl.max(s, axis=1) * scale)
    p = gl.exp2(s * scale - new_top[:, None])
    rescale = gl.exp2(top - new_top)
    total = total * rescale + gl.sum(p, axis=1)
    return new_top, total, rescale, gl.convert_layout(p.to(gl.bfloat16), WEIGHTS)


@gluon.jit
def store_block(out, lse, q_tile, acc, logarithm, where, block, tokens, D: gl.constexpr, ROWS: gl.constexpr):
    """A query block's result through the shared memory its queries were in; lse of rows that exist."""
    sample, head, line = where
    matrix(q_tile, D).store(acc.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [sample, head, block * TILE, 0], q_tile)
    row = block * TILE + gl.arange(0, TILE, layout=ROWS)
    gl.store(lse + line.to(gl.int64) * tokens + row, logarithm, mask=row < tokens)
    tma.store_wait(0)


@gluon.jit
def store_nothing(out, lse, q_tile, where, block, tokens, D: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr):
    """The result of a query block that reads nothing."""
    acc = gl.zeros([TILE, D], gl.float32, layout=OUT)
    logarithm = gl.full([TILE], float("-inf"), gl.float32, layout=ROWS)
    store_block(out, lse, q_tile, acc, logarithm, where, block, tokens, D, ROWS)
