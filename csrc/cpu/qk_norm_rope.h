// RMSNorm of every head, then rotary position embedding of the pairs (2i, 2i+1).
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// x is [batch, sequence, heads, width] with unit stride along the even width, out the same and dense; weight
// [width], cos and sin [sequence, width / 2] are dense float32.
template <class T>
struct NormRope {
  const T* x;
  const float* weight;
  const float* cos;
  const float* sin;
  T* out;
  int64_t sequence, heads, width;
  int64_t batch_stride, sequence_stride, head_stride;
  float eps;
};

// A row is one token, all its heads.
namespace portable {
template <class T>
void norm_rope(const NormRope<T>& op, int64_t first_row, int64_t end_row);
}
namespace avx2 {
template <class T>
void norm_rope(const NormRope<T>& op, int64_t first_row, int64_t end_row);
}

}  // namespace k5
