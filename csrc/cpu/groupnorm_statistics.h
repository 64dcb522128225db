// Mean and variance of every group of channels, for dense [batch, channels, positions] and dense channels-last
// [batch, positions, channels].
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

// mean and variance are [batch, groups]; the variance is over the number of values.
template <class T>
struct GroupNormStatistics {
  const T* x;
  double* mean;
  double* variance;
  int64_t channels, positions, groups;
};

// Channels-last is cut into chunks of positions, of a fixed length so that the order of the sums, and with it every
// bit, is the same for any number of threads.
constexpr int64_t kChunkPositions = 128;

static inline int64_t chunks_of(int64_t positions) { return (positions + kChunkPositions - 1) / kChunkPositions; }

namespace portable {
// Contiguous: whole groups, numbered batch * groups + group.
template <class T>
void groupnorm_statistics_contiguous(const GroupNormStatistics<T>& op, int64_t first_group, int64_t end_group);

// Channels-last, step 1, chunks numbered batch * chunks + chunk: partial[chunk] = each channel's mean less its pivot,
// then its sum of squared differences from the mean. The pivot, the channel's value at the sample's first position,
// keeps a large mean from costing digits.
template <class T>
void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>& op, float* partial, int64_t first_chunk,
                                    int64_t end_chunk);

// Channels-last, step 2: the chunks of whole samples merged.
template <class T>
void groupnorm_statistics_merge(const GroupNormStatistics<T>& op, const float* partial, int64_t first_sample,
                                int64_t end_sample);
}  // namespace portable
namespace avx2 {
template <class T>
void groupnorm_statistics_contiguous(const GroupNormStatistics<T>& op, int64_t first_group, int64_t end_group);
template <class T>
void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>& op, float* partial, int64_t first_chunk,
                                    int64_t end_chunk);
template <class T>
void groupnorm_statistics_merge(const GroupNormStatistics<T>& op, const float* partial, int64_t first_sample,
                                int64_t end_sample);
}  // namespace avx2

}  // namespace k5
