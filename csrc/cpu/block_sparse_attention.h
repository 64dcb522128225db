// Attention in which each block of queries reads its own list of key blocks, and its gradients.
#pragma once

#include <cstdint>

#include "tile.h"

namespace k5 {

// [batch, heads, sequence, width] with unit stride along the width.
template <class T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, step;
};

// Row r of (batch, head) reads the blocks indices[offsets[r]] to indices[offsets[r + 1] - 1]. A stride is zero where
// all samples, or all heads, have one mask.
struct BlockLists {
  const int64_t* offsets;
  const int32_t* indices;
  int64_t batch_stride, head_stride;
};

struct AttentionSizes {
  const int64_t* block_starts;
  int64_t heads, blocks, width;
  float scale;
};

// lse is dense [batch, heads, sequence].
template <class T>
struct Attention {
  AttentionSizes sizes;
  Heads<const T> q, k, v;
  Heads<T> out;
  Heads<float> lse;
  BlockLists reads;
};

// Of every query, `shift` is Σ_d grad_out·out - grad_lse and `base` is its lse in base 2. `readers` lists the query
// blocks that read each key block.
//
// The key blocks of a head are divided into `shares`. The gradient of q is the sum, in order, of one part for each
// share. Two schedules give the same bits: one pass over the key blocks that forms all three gradients, a share being a
// piece of work; or two passes, over the key blocks for the gradients of k and v and over the query blocks for that of
// q.
template <class T>
struct AttentionBackward {
  AttentionSizes sizes;
  Heads<const T> q, k, v, grad_out;
  Heads<const float> base, shift;
  Heads<T> grad_q, grad_k, grad_v;
  BlockLists reads, readers;
  int64_t shares;
};

// Enough shares for a few cores to work on a single head. The number does not depend on the number of threads, because
// the bits of the gradient of q depend on it.
static inline int64_t shares_of_a_head(int64_t heads) { return heads >= 4 ? 1 : heads >= 2 ? 2 : 4; }

// Inputs and outputs of `prepare_attention_backward`. grad_lse.data may be null. lse, shift and base are dense
// [batch, heads, sequence].
template <class T>
struct AttentionSaved {
  AttentionSizes sizes;
  Heads<const T> out, grad_out;
  Heads<const float> grad_lse;
  const float* lse;
  float *shift, *base;
};

// Floats of scratch memory, aligned to 64 bytes, that the functions below need.
static inline int64_t attention_scratch(const AttentionSizes& sizes) {
  return 4 * kTileTokens * padded(sizes.width) + kTileTokens * (2 * kPanel + 2);
}
// For the bfloat16 forward in avx512_bf16.
static inline int64_t attention_bf16_scratch(const AttentionSizes& sizes) {
  return kTileTokens * padded(sizes.width) * 3 + kTileTokens * (kTileTokens + 2);
}
static inline int64_t attention_backward_scratch(const AttentionSizes& sizes) {
  return 7 * kTileTokens * padded(sizes.width) + kTileTokens * (kPanel + kTileTokens + 1);
}
static inline int64_t attention_grad_q_part(const AttentionSizes& sizes) {
  return sizes.block_starts[sizes.blocks] * padded(sizes.width);
}

#define K5_DECLARE_ATTENTION(isa)                                                                                \
  namespace isa {                                                                                                \
  /* One block of queries: `item` counts (batch, head, block). */                                                \
  template <class T>                                                                                             \
  void block_sparse_attention(const Attention<T>& op, int64_t item, float* scratch);                             \
  /* Shift and base of the queries from first to end, numbered over (batch, head, sequence). */                  \
  template <class T>                                                                                             \
  void prepare_attention_backward(const AttentionSaved<T>& op, int64_t first, int64_t end);                      \
  /* Gradients of k and v of one share, and its part of the gradient of q, float32 rows: `item` counts           \
     (batch, head, share). */                                                                                    \
  template <class T>                                                                                             \
  void share_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch, float* grad_q_part);        \
  /* Gradient of q of one block: the sum of the parts of its head, which are contiguous. `item` counts           \
     (batch, head, block). */                                                                                    \
  template <class T>                                                                                             \
  void add_grad_q_parts(const AttentionBackward<T>& op, int64_t item, float* scratch, const float* parts);       \
  /* Gradients of k and v of one block: `item` counts (batch, head, block). */                                   \
  template <class T>                                                                                             \
  void key_block_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch);                        \
  /* Gradient of q of one block: `item` counts (batch, head, block). */                                          \
  template <class T>                                                                                             \
  void query_block_gradient(const AttentionBackward<T>& op, int64_t item, float* scratch);                       \
  }
K5_DECLARE_ATTENTION(portable)
K5_DECLARE_ATTENTION(avx2)
K5_DECLARE_ATTENTION(avx512_bf16)
#undef K5_DECLARE_ATTENTION
namespace avx512_bf16 {
void block_sparse_attention(const Attention<BFloat16>& op, int64_t item, float* scratch);
}

}  // namespace k5
