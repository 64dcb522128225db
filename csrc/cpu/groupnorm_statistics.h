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

// The positions [first, end) of a chunk, numbered over the whole batch, and the sample they belong to.
struct PositionsChunk {
  int64_t sample, first, end;
};

static inline PositionsChunk chunk_at(int64_t number, int64_t positions) {
  const int64_t chunks = chunks_of(positions), sample = number / chunks, start = number % chunks * kChunkPositions;
  const int64_t end = start + kChunkPositions < positions ? start + kChunkPositions : positions;
  return {sample, sample * positions + start, sample * positions + end};
}

// The gradient of x from those of the statistics: constant + linear * (x - centre), of each channel of each sample.
// terms [batch, 3, channels]: centre, linear, constant. past_caches: whether to write grad_x by `stream` of vec.h.
template <class T>
struct GroupNormStatisticsBackward {
  const T* x;
  const float* terms;
  T* grad_x;
  int64_t channels, positions;
  bool past_caches;
};

#define K5_DECLARE_GROUPNORM_STATISTICS(isa)                                                                    \
  namespace isa {                                                                                               \
  /* Contiguous: whole groups, numbered batch * groups + group. */                                              \
  template <class T>                                                                                            \
  void groupnorm_statistics_contiguous(const GroupNormStatistics<T>& op, int64_t first_group,                   \
                                       int64_t end_group);                                                      \
  /* Channels-last, step 1, chunks numbered batch * chunks + chunk: partial[chunk] = each channel's mean less   \
     its pivot, then its sum of squared differences from the mean. The pivot, the channel's value at the        \
     sample's first position, keeps a large mean from costing digits. */                                        \
  template <class T>                                                                                            \
  void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>& op, float* partial, int64_t first_chunk,    \
                                      int64_t end_chunk);                                                       \
  /* Channels-last, step 2: the chunks of whole samples merged. */                                              \
  template <class T>                                                                                            \
  void groupnorm_statistics_merge(const GroupNormStatistics<T>& op, const float* partial, int64_t first_sample, \
                                  int64_t end_sample);                                                          \
  /* Contiguous: channels, numbered sample * channels + channel. */                                             \
  template <class T>                                                                                            \
  void groupnorm_statistics_backward_contiguous(const GroupNormStatisticsBackward<T>& op,                       \
                                                int64_t first_channel, int64_t end_channel);                    \
  /* Channels-last: positions, numbered over the whole batch. */                                                \
  template <class T>                                                                                            \
  void groupnorm_statistics_backward_channels_last(const GroupNormStatisticsBackward<T>& op,                    \
                                                   int64_t first_position, int64_t end_position);               \
  }
K5_DECLARE_GROUPNORM_STATISTICS(portable)
K5_DECLARE_GROUPNORM_STATISTICS(avx2)
K5_DECLARE_GROUPNORM_STATISTICS(avx512_bf16)
#undef K5_DECLARE_GROUPNORM_STATISTICS

}  // namespace k5
