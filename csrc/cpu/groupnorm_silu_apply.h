// GroupNorm by given statistics, then SiLU, for dense [batch, channels, positions] and dense channels-last
// [batch, positions, channels].
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// mean and variance are [batch, groups]; weight and bias are dense float32 [channels]. past_caches: whether to write out
// by `stream` of vec.h.
template <class T>
struct GroupNormSiLU {
  const T* x;
  const double* mean;
  const double* variance;
  const float* weight;
  const float* bias;
  T* out;
  int64_t channels, positions, groups;
  float eps;
  bool past_caches;
};

namespace portable {
// Contiguous: whole groups, numbered batch * groups + group.
template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group);

// Channels-last, step 1, samples: centres_slopes[batch] = each channel's mean, then weight / deviation.
template <class T>
void groupnorm_silu_slopes(const GroupNormSiLU<T>& op, float* centres_slopes, int64_t first_sample, int64_t end_sample);

// Channels-last, step 2: positions, numbered over the whole batch.
template <class T>
void groupnorm_silu_channels_last(const GroupNormSiLU<T>& op, const float* centres_slopes, int64_t first_position,
                                  int64_t end_position);
}  // namespace portable
namespace avx2 {
template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group);
template <class T>
void groupnorm_silu_slopes(const GroupNormSiLU<T>& op, float* centres_slopes, int64_t first_sample, int64_t end_sample);
template <class T>
void groupnorm_silu_channels_last(const GroupNormSiLU<T>& op, const float* centres_slopes, int64_t first_position,
                                  int64_t end_position);
}  // namespace avx2

}  // namespace k5
