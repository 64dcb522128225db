// Gradients through SiLU and the normalization of GroupNorm, for dense [batch, channels, positions] and dense
// channels-last [batch, positions, channels].
#pragma once

#include <cstdint>

#include "groupnorm_statistics.h"
#include "vec.h"

namespace k5 {

// What the gradient of z below is multiplied by. For bfloat16 that turns a multiplication with an addition into an
// addition, which other units of the processor do.
template <class T>
constexpr float kScaleOfGradient = sizeof(T) == sizeof(float) ? 1 : 0.693147181f;  // ln(2)

// What the kernels know of a channel of a sample: rows of `terms` [batch, kTerms, channels].
enum Term : int64_t { kCentre, kSlope, kBias, kWeight, kLinear, kConstant, kInverse, kTerms };

// With c = x - centre and z = c * slope + bias, the forward's result is silu(z). The gradient of z is
// g = grad * silu'(z) * kScaleOfGradient<T>, and
//
//     grad_x = (g * weight - c * linear - constant) * inverse        where grad_x is not null
//     sums   = sum(g), sum(g * c) over positions                     where sums is not null
//
// sums: [batch, 2, channels]; in channels-last [batch, chunks_of(positions), 2, channels]. past_caches: whether to
// write grad_x by `stream` of vec.h.
template <class T>
struct GroupNormSiLUBackward {
  const T* grad;
  const T* x;
  const float* terms;
  T* grad_x;
  float* sums;
  int64_t channels, positions;
  bool past_caches;
};

#define K5_DECLARE_GROUPNORM_SILU_BACKWARD(isa)                                                                 \
  namespace isa {                                                                                               \
  /* Contiguous: channels, numbered sample * channels + channel. */                                             \
  template <class T>                                                                                            \
  void groupnorm_silu_backward_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel,            \
                                          int64_t end_channel);                                                 \
  /* Channels-last: chunks of positions, numbered sample * chunks + chunk. */                                   \
  template <class T>                                                                                            \
  void groupnorm_silu_backward_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk,           \
                                             int64_t end_chunk);                                                \
  }
K5_DECLARE_GROUPNORM_SILU_BACKWARD(portable)
K5_DECLARE_GROUPNORM_SILU_BACKWARD(avx2)
K5_DECLARE_GROUPNORM_SILU_BACKWARD(avx512_bf16)
#undef K5_DECLARE_GROUPNORM_SILU_BACKWARD

}  // namespace k5
