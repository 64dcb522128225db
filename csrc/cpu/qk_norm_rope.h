// RMSNorm of every head, then rotary position embedding of the pairs (2i, 2i+1); and its gradients.
#pragma once

#include <cstdint>

#include "pieces.h"
#include "vec.h"

namespace k5 {

// [batch, sequence, heads, width] with unit stride along the width.
template <class T>
struct Heads {
  const T* data;
  int64_t batch_stride, sequence_stride, head_stride;
};

// The width is even. weight [width], cos and sin [sequence, width / 2] are dense float32; out is dense. past_caches:
// whether to write out by `stream` of vec.h.
template <class T>
struct NormRope {
  Heads<T> x;
  const float* weight;
  const float* cos;
  const float* sin;
  T* out;
  int64_t sequence, heads, width;
  float eps;
  bool past_caches;
};

// The same, with grad the gradient of out. grad_weight [pieces, width]: sums over the kPieceRows tokens of each piece;
// the last piece may have fewer.
template <class T>
struct NormRopeBackward {
  Heads<T> grad, x;
  const float* weight;
  const float* cos;
  const float* sin;
  T* grad_x;
  float* grad_weight;
  int64_t batch, sequence, heads, width;
  float eps;
  bool past_caches;
};

// A row is one token, all its heads.
#define K5_DECLARE_QK_NORM_ROPE(isa)                                                             \
  namespace isa {                                                                                \
  template <class T>                                                                             \
  void norm_rope(const NormRope<T>& op, int64_t first_row, int64_t end_row);                     \
  template <class T>                                                                             \
  void norm_rope_backward(const NormRopeBackward<T>& op, int64_t first_piece, int64_t end_piece); \
  }
K5_DECLARE_QK_NORM_ROPE(portable)
K5_DECLARE_QK_NORM_ROPE(avx2)
K5_DECLARE_QK_NORM_ROPE(avx512_bf16)
#undef K5_DECLARE_QK_NORM_ROPE

}  // namespace k5
