// Addresses, prefetches and the end of the softmax, shared by the files that compute attention. Everything here is
// static or inlined, for the reason in isa.h.
#pragma once

#include "block_sparse_attention.h"
#include "prefetch.h"
#include "vec_math.h"

namespace k5 {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr float kInfinity = __builtin_inff();

struct Place {
  int64_t batch, head, block;
};

K5_INLINE Place place_of(const AttentionSizes& sizes, int64_t item) {
  const int64_t block = item % sizes.blocks, head = item / sizes.blocks;
  return {head / sizes.heads, head % sizes.heads, block};
}

template <class T>
K5_INLINE T* head_of(const Heads<T>& tensor, const Place& at) {
  return tensor.data + at.batch * tensor.batch_stride + at.head * tensor.head_stride;
}

K5_INLINE const int64_t* offsets_of(const BlockLists& lists, const Place& at) {
  return lists.offsets + at.batch * lists.batch_stride + at.head * lists.head_stride;
}

// Calls body(first token, tokens) for each part of at most kTileTokens of a block.
template <class Body>
K5_INLINE void for_parts(const AttentionSizes& sizes, int64_t block, const Body& body) {
  const int64_t end = sizes.block_starts[block + 1];
  for (int64_t first = sizes.block_starts[block]; first < end; first += kTileTokens)
    body(first, smaller(kTileTokens, end - first));
}

K5_INLINE void fill(float* target, int64_t count, float value) {
  for (int64_t i = 0; i < count; i++) target[i] = value;
}

// Calls run<width>() for whole blocks of a common width, whose loops the compiler can unroll, else run<0>().
template <class Run>
K5_INLINE void for_width(bool whole, int64_t width, const Run& run) {
  if (whole && width == 64) run.template operator()<64>();
  else if (whole && width == 128) run.template operator()<128>();
  else run.template operator()<0>();
}

// Queues the first part of a block.
template <class T>
K5_INLINE void fetch_block(Prefetch& prefetch, const AttentionSizes& sizes, const Heads<T>& tensor, const Place& at,
                           int64_t block) {
  const int64_t first = sizes.block_starts[block];
  prefetch.add(head_of(tensor, at) + first * tensor.step, tensor.step,
               smaller(kTileTokens, sizes.block_starts[block + 1] - first), sizes.width);
}

// Queues what is needed after an entry of a list: the keys and values of the next entry; after the last entry the
// memory of the output, and the queries of the next block with its first keys and values.
template <class T>
K5_INLINE void fetch_next(Prefetch& prefetch, const Attention<T>& op, const Place& at, int64_t entry) {
  const int64_t* offsets = offsets_of(op.reads, at) + at.block;
  const bool last_entry = entry + 1 == offsets[1], last_block = at.block + 1 == op.sizes.blocks;
  prefetch.clear();
  if (last_entry) fetch_block(prefetch, op.sizes, op.out, at, at.block);
  if (last_entry && !last_block) fetch_block(prefetch, op.sizes, op.q, at, at.block + 1);
  if (!last_entry || (!last_block && offsets[1] < offsets[2])) {
    fetch_block(prefetch, op.sizes, op.k, at, op.reads.indices[entry + 1]);
    fetch_block(prefetch, op.sizes, op.v, at, op.reads.indices[entry + 1]);
  }
}

// Writes lse from the base of each row and the total of its weights 2^(score - base), and replaces the total with the
// factor that normalizes the row. base, total: [64]; the values behind the last row are used but not stored.
K5_INLINE void finish_rows(const float* base, float* total, int64_t rows, bool reads_nothing, float* lse) {
  if (reads_nothing) return fill(lse, rows, -kInfinity);  // the totals are 0, which as factors give zeros
  for (int64_t row = 0; row < rows; row += kLanes) {
    const Vec8 bases = load(base + row), totals = load(total + row);
    // Where all scores are -inf: NaN, as 0/0 in the definition.
    const Vec8 undefined = bases == -kInfinity ? splat(0.0f) / totals : Vec8{};
    const Vec8 logs = (bases + log2(totals)) * kLn2 + undefined;
    if (row + kLanes <= rows) store(lse + row, logs);
    else store_partial(lse + row, logs, rows - row);
    store(total + row, splat(1.0f) / totals + undefined);
  }
}

}  // namespace
}  // namespace k5
