// x + gate * y, the gate one row a clip or one a token; and its gradients.
#pragma once

#include <cstdint>

#include "modulation.h"
#include "pieces.h"
#include "vec.h"

namespace k5 {

// x, y and out are dense [batch, sequences.tokens, width]. past_caches: whether to write out by `stream` of vec.h.
template <class X, class Y>
struct GatedResidual {
  const X* x;
  const Y* y;
  Modulation gate;
  X* out;
  Sequences sequences;
  int64_t width;
  bool past_caches;
};

// grad (of out), y and grad_y are dense [batch, sequences.tokens, width].
template <class X, class Y>
struct GatedResidualBackward {
  const X* grad;
  const Y* y;
  Modulation gate;
  Y* grad_y;
  ModulationGradient grad_gate;
  Sequences sequences;
  int64_t width;
  bool past_caches;
};

#define K5_DECLARE_GATED_RESIDUAL(isa)                                                                         \
  namespace isa {                                                                                             \
  /* A row is one token, numbered over the whole batch. */                                                    \
  template <class X, class Y>                                                                                 \
  void gated_residual(const GatedResidual<X, Y>& op, int64_t first_row, int64_t end_row);                     \
  template <class X, class Y>                                                                                 \
  void gated_residual_backward(const GatedResidualBackward<X, Y>& op, const Piece* pieces, int64_t first_piece, \
                               int64_t end_piece);                                                            \
  }
K5_DECLARE_GATED_RESIDUAL(portable)
K5_DECLARE_GATED_RESIDUAL(avx2)
K5_DECLARE_GATED_RESIDUAL(avx512_bf16)
#undef K5_DECLARE_GATED_RESIDUAL

}  // namespace k5
