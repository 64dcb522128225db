// LayerNorm without affine, then scale and shift by the time embedding: norm(x) * (1 + scale) + shift.
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// x and out are dense [batch, sequence, width]; shift and scale are float32 with unit stride along the width
// and zero sequence stride where one row serves a whole sample.
template <class T>
struct LayerNormModulate {
  const T* x;
  const float* shift;
  const float* scale;
  T* out;
  int64_t sequence, width;
  int64_t shift_batch_stride, shift_sequence_stride;
  int64_t scale_batch_stride, scale_sequence_stride;
  float eps;
};

namespace portable {
template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row);
}
namespace avx2 {
template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row);
}

}  // namespace k5
