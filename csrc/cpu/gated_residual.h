// x + gate * y, the gate one row a clip or one a token.
#pragma once

#include <cstdint>

#include "modulation.h"
#include "vec.h"

namespace k5 {

// x, y and out are dense [batch, sequences.tokens, width].
template <class X, class Y>
struct GatedResidual {
  const X* x;
  const Y* y;
  Modulation gate;
  X* out;
  Sequences sequences;
  int64_t width;
};

// A row is one token, numbered over the whole batch.
namespace portable {
template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row);
}
namespace avx2 {
template <class X, class Y>
void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row);
}

}  // namespace k5
