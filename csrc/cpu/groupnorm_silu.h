// GroupNorm, then SiLU, for dense [batch, channels, positions] and dense channels-last [batch, positions, channels].
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// weight and bias are dense float32 [channels].
template <class T>
struct GroupNormSiLU {
  const T* x;
  const float* weight;
  const float* bias;
  T* out;
  int64_t channels, positions, groups;
  float eps;
};

// Channels-last runs in three steps over chunks of positions, of a fixed length so that the sums' order, and with
// it every bit, is the same for any number of threads.
constexpr int64_t kChunkPositions = 128;

static inline int64_t chunks_of(int64_t positions) { return (positions + kChunkPositions - 1) / kChunkPositions; }

namespace portable {
// Contiguous: whole groups, numbered batch * groups + group.
template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group);

// Step 1, chunks numbered batch * chunks + chunk: partial[chunk] = each channel's mean less its pivot, then its sum
// of squared differences from the mean. The pivot, the channel's value at the sample's first position, keeps a large
// mean from costing digits.
template <class T>
void groupnorm_silu_partial(const GroupNormSiLU<T>& op, float* partial, int64_t first_chunk, int64_t end_chunk);

// Step 2, samples: moments[batch] = each channel's group mean, then weight / deviation.
template <class T>
void groupnorm_silu_moments(const GroupNormSiLU<T>& op, const float* partial, float* moments, int64_t first_sample,
                            int64_t end_sample);

// Step 3, chunks as in step 1: out.
template <class T>
void groupnorm_silu_apply(const GroupNormSiLU<T>& op, const float* moments, int64_t first_chunk, int64_t end_chunk);
}  // namespace portable
namespace avx2 {
template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group);
template <class T>
void groupnorm_silu_partial(const GroupNormSiLU<T>& op, float* partial, int64_t first_chunk, int64_t end_chunk);
template <class T>
void groupnorm_silu_moments(const GroupNormSiLU<T>& op, const float* partial, float* moments, int64_t first_sample,
                            int64_t end_sample);
template <class T>
void groupnorm_silu_apply(const GroupNormSiLU<T>& op, const float* moments, int64_t first_chunk, int64_t end_chunk);
}  // namespace avx2

}  // namespace k5
