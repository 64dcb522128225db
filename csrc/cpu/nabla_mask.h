// Which key blocks each query block keeps: attention of pooled blocks, softmax, and the largest probabilities up to a
// mass, without a sort.
#pragma once

#include <cstdint>

#include "tile.h"

namespace k5 {

// [batch, heads, sequence, width] with unit stride along the width. The pooled rows hold float32 means: of queries as
// rows [batch·heads, blocks, padded(width)], of keys as panels [batch·heads, padded(blocks) / 16, padded(width), 16].
template <class T>
struct BlockMeans {
  const T* source;
  int64_t batch_stride, head_stride, step;
  const int64_t* block_starts;
  int64_t heads, blocks, width;
  float* pooled;
};

// near_offsets and near_indices list the blocks to keep in any case, the same for all heads, or are null.
// bits: of every row [batch·heads, blocks, row_words], bit j for block j of the row's clip; counts: those set.
struct NablaSelection {
  const float *queries, *keys;
  const int64_t *clip_starts, *near_offsets;
  const int32_t* near_indices;
  int64_t blocks, width, row_words;
  float scale, dropped_mass;
  uint64_t* bits;
  int64_t* counts;
};

constexpr int64_t kSelectedRows = 6;

// Pieces of work of a head in `nabla_select`.
static inline int64_t selection_pieces(int64_t blocks) { return (blocks + kSelectedRows - 1) / kSelectedRows; }

// Floats of one row of logits, with room for what stands before a clip in its first panel and for padding.
static inline int64_t logits_step(int64_t blocks) { return padded(blocks) + 4 * kPanel; }

// Floats of scratch memory, aligned to 64 bytes, that `nabla_select` wants.
static inline int64_t selection_scratch(int64_t blocks) { return (kSelectedRows + 1) * logits_step(blocks); }

#define K5_DECLARE_NABLA_MASK(isa)                                                                      \
  namespace isa {                                                                                       \
  /* Blocks numbered first to end over (batch, head, block). */                                         \
  template <class T>                                                                                    \
  void pool_queries(const BlockMeans<T>& op, int64_t first, int64_t end);                               \
  template <class T>                                                                                    \
  void pool_keys(const BlockMeans<T>& op, int64_t first, int64_t end);                                  \
  /* A few rows of one head: `item` counts (batch, head, piece). */                                     \
  void nabla_select(const NablaSelection& op, int64_t item, float* scratch);                            \
  /* The lists of the rows numbered first to end, each to indices + the sum of the counts before it. */ \
  void nabla_lists(const NablaSelection& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end); \
  }
K5_DECLARE_NABLA_MASK(portable)
K5_DECLARE_NABLA_MASK(avx2)
#undef K5_DECLARE_NABLA_MASK

}  // namespace k5
