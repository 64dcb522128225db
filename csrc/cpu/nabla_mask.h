// Which key blocks each query block keeps: logits of pooled blocks, softmax, and the largest probabilities up to a
// mass, without a sort.
#pragma once

#include <cstdint>

#include "tile.h"

namespace k5 {

// Tokens, [batch, heads, sequence, width] with unit stride along the width, and memory for the means of their blocks in
// float32, for the heads of even and of odd number: queries as rows [2, blocks, padded(width)], keys as panels
// [2, padded(blocks) / 16, padded(width), 16].
template <class T>
struct BlockMeans {
  const T* source;
  int64_t batch_stride, head_stride, step;
  const int64_t* block_starts;
  int64_t heads, blocks, width;
  float* pooled;
};

// Heads are numbered over (batch, head). near_offsets, near_indices: lists of the blocks that all heads keep in any
// case, or null. bits: [heads, blocks, row_words]; bit j of a row stands for block j of the row's clip. counts: the
// number of bits set in each row.
struct NablaSelection {
  const int64_t *clip_starts, *near_offsets;
  const int32_t* near_indices;
  int64_t heads, blocks, row_words;
  float scale, dropped_mass;
  uint64_t* bits;
  int64_t* counts;
};

// Blocks of a piece of work: the columns of one panel, so that no two threads write to the same cache line of means.
constexpr int64_t kPieceBlocks = kPanel;

// Pieces of work of a head in `nabla_select`.
static inline int64_t selection_pieces(int64_t blocks) { return (blocks + kPieceBlocks - 1) / kPieceBlocks; }

// Floats of one row of logits, with room for the columns before the clip in its first panel and for padding.
static inline int64_t logits_step(int64_t blocks) { return padded(blocks) + 4 * kPanel; }

// Rows of logits that are computed together.
constexpr int64_t kLogitRows = 6;

// Floats of scratch memory, aligned to 64 bytes, that `nabla_select` needs.
static inline int64_t selection_scratch(int64_t blocks) { return (kLogitRows + 1) * logits_step(blocks); }

#define K5_DECLARE_NABLA_MASK(isa)                                                                                   \
  namespace isa {                                                                                                    \
  /* One piece of blocks in a two-stage pipeline over the heads: selects for head - 1 while it prefetches the tokens  \
     of `head`, then pools those. Call it for `head` from 0, which only pools, to op.heads, which only selects. */    \
  template <class T>                                                                                                 \
  void nabla_select(const NablaSelection& op, const BlockMeans<T>& queries, const BlockMeans<T>& keys, int64_t head, \
                    int64_t piece, float* scratch);                                                                  \
  /* Writes the lists of the rows from first to end, each from its offset in indices on. */                           \
  void nabla_lists(const NablaSelection& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end);  \
  }
K5_DECLARE_NABLA_MASK(portable)
K5_DECLARE_NABLA_MASK(avx2)
#undef K5_DECLARE_NABLA_MASK

}  // namespace k5
