// LayerNorm without affine, then scale and shift by the time embedding: norm(x) * (1 + scale) + shift; and its
// gradients.
#pragma once

#include <cstdint>

#include "modulation.h"
#include "pieces.h"
#include "vec.h"

namespace k5 {

// x and out are dense [batch, sequences.tokens, width]. past_caches: whether to write out by `stream` of vec.h.
template <class T>
struct LayerNormModulate {
  const T* x;
  Modulation shift, scale;
  T* out;
  Sequences sequences;
  int64_t width;
  float eps;
  bool past_caches;
};

// grad (of out), x and grad_x are dense [batch, sequences.tokens, width].
template <class T>
struct LayerNormModulateBackward {
  const T* grad;
  const T* x;
  Modulation scale;
  T* grad_x;
  ModulationGradient grad_shift, grad_scale;
  Sequences sequences;
  int64_t width;
  float eps;
  bool past_caches;
};

// A row is one token, numbered over the whole batch.
#define K5_DECLARE_LAYERNORM_MODULATE(isa)                                                                      \
  namespace isa {                                                                                               \
  template <class T>                                                                                            \
  void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row);                  \
  template <class T>                                                                                            \
  void layernorm_modulate_backward(const LayerNormModulateBackward<T>& op, const Piece* pieces,                 \
                                   int64_t first_piece, int64_t end_piece);                                     \
  }
K5_DECLARE_LAYERNORM_MODULATE(portable)
K5_DECLARE_LAYERNORM_MODULATE(avx2)
K5_DECLARE_LAYERNORM_MODULATE(avx512_bf16)
#undef K5_DECLARE_LAYERNORM_MODULATE

}  // namespace k5
