// Which key blocks each query block keeps: attention of pooled blocks, softmax, and the largest probabilities up to a
// mass, without a sort.
#pragma once

#include <cstdint>

#include "tile.h"

namespace k5 {

// [batch, heads, sequence, width] with unit stride along the width. The pooled rows hold float32 means of two heads in
// turn: of queries as rows [2, blocks, padded(width)], of keys as panels [2, padded(blocks) / 16, padded(width), 16].
template <class T>
struct BlockMeans {
  const T* source;
  int64_t batch_stride, head_stride, step;
  const int64_t* block_starts;
  int64_t heads, blocks, width;
  float* pooled;
};

// Heads are numbered over the batch. near_offsets and near_indices list the blocks to keep in any case, the same for
// all heads, or are null.
// bits: of every row [heads, blocks, row_words], bit j for block j of the row's clip; counts: those set.
struct NablaSelection {
  const int64_t *clip_starts, *near_offsets;
  const int32_t* near_indices;
  int64_t heads, blocks, row_words;
  float scale, dropped_mass;
  uint64_t* bits;
  int64_t* counts;
};

// Blocks of a piece of work: the columns of one panel, so that no two threads write to one line of pooled keys.
constexpr int64_t kPieceBlocks = kPanel;

// Pieces of work of a head in `nabla_select`.
static inline int64_t selection_pieces(int64_t blocks) { return (blocks + kPieceBlocks - 1) / kPieceBlocks; }

// Floats of one row of logits, with room for what stands before a clip in its first panel and for padding.
static inline int64_t logits_step(int64_t blocks) { return padded(blocks) + 4 * kPanel; }

// Rows of logits in work at a time.
constexpr int64_t kLogitRows = 6;

// Floats of scratch memory, aligned to 64 bytes, that `nabla_select` wants.
static inline int64_t selection_scratch(int64_t blocks) { return (kLogitRows + 1) * logits_step(blocks); }

#define K5_DECLARE_NABLA_MASK(isa)                                                                                   \
  namespace isa {                                                                                                    \
  /* One piece of the blocks: selects for those of head - 1, while it fetches the tokens of those of `head`, and     \
     pools them. Head 0 has none before it, the last but one none behind it: `head` goes from 0 to op.heads. */      \
  template <class T>                                                                                                 \
  void nabla_select(const NablaSelection& op, const BlockMeans<T>& queries, const BlockMeans<T>& keys, int64_t head, \
                    int64_t piece, float* scratch);                                                                  \
  /* The lists of the rows numbered first to end, each to indices + the sum of the counts before it. */              \
  void nabla_lists(const NablaSelection& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end);  \
  }
K5_DECLARE_NABLA_MASK(portable)
K5_DECLARE_NABLA_MASK(avx2)
#undef K5_DECLARE_NABLA_MASK

}  // namespace k5
