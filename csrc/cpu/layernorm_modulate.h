// LayerNorm without affine, then scale and shift by the time embedding: norm(x) * (1 + scale) + shift.
#pragma once

#include <cstdint>

#include "modulation.h"
#include "vec.h"

namespace k5 {

// x and out are dense [batch, sequences.tokens, width].
template <class T>
struct LayerNormModulate {
  const T* x;
  Modulation shift, scale;
  T* out;
  Sequences sequences;
  int64_t width;
  float eps;
};

// A row is one token, numbered over the whole batch.
namespace portable {
template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row);
}
namespace avx2 {
template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row);
}

}  // namespace k5
