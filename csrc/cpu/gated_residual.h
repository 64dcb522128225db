// x + gate * y, the gate one row a sample or one a token.
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// x, y and out are dense [batch, sequence, width]; gate is float32 with unit stride along the width and zero
// sequence stride where one row serves a whole sample.
template <class X, class Y>
struct GatedResidual {
  const X* x;
  const Y* y;
  const float* gate;
  X* out;
  int64_t sequence, width;
  int64_t gate_batch_stride, gate_sequence_stride;
};

namespace portable {
template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row);
}
namespace avx2 {
template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row);
}

}  // namespace k5
