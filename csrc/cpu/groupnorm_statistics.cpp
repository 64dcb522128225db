#include "groupnorm_statistics.h"

#include <algorithm>

namespace k5::K5_ISA {
namespace {

// Count, mean and sum of squared differences from the mean, merged piece by piece.
struct Moments {
  double count = 0, mean = 0, square = 0;

  void merge(double other_count, double other_mean, double other_square) {
    const double distance = other_mean - mean, share = other_count / (count + other_count);
    square += other_square + distance * distance * count * share;
    mean += distance * share;
    count += other_count;
  }
};

inline float load_one(const float* source) { return *source; }
inline float load_one(const BFloat16* source) { return load_partial(source, 1)[0]; }

// The moments of a dense run. Two-pass, piece by piece, so that the second pass over a piece reads it from the cache.
// What is summed is x - pivot, the run's first value, so that a large mean costs no digits.
template <class T>
inline Moments moments_of_run(const T* run, int64_t length) {
  constexpr int64_t kPiece = 1024;
  const float pivot = load_one(run);
  Moments moments;
  for (int64_t start = 0; start < length; start += kPiece) {
    const int64_t count = std::min(kPiece, length - start), whole = count / kLanes * kLanes, rest = count - whole;
    const T* piece = run + start;
    Vec8 totals = {}, squares = {};
    for (int64_t i = 0; i < whole; i += kLanes) totals += load(piece + i) - pivot;
    if (rest) totals += keep_first(load_partial(piece + whole, rest) - pivot, rest);
    const float offset = sum(totals) / count, mean = pivot + offset;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec8 difference = load(piece + i) - mean;
      squares += difference * difference;
    }
    if (rest) {
      const Vec8 difference = keep_first(load_partial(piece + whole, rest) - mean, rest);
      squares += difference * difference;
    }
    moments.merge(count, static_cast<double>(pivot) + offset, sum(squares));
  }
  return moments;
}

// The positions [first, end) of a chunk, numbered over the whole batch, and the sample they belong to.
struct Chunk {
  int64_t sample, first, end;
};

inline Chunk chunk_at(int64_t number, int64_t positions) {
  const int64_t chunks = chunks_of(positions), sample = number / chunks, start = number % chunks * kChunkPositions;
  const int64_t end = std::min(start + kChunkPositions, positions);
  return {sample, sample * positions + start, sample * positions + end};
}

// Of a chunk, for whole vectors of channels, or (kPartial) for one of `count` channels.
template <int kVectors, bool kPartial, class T>
inline void chunk_moments(const T* x, int64_t stride, int64_t positions, int64_t count, const T* pivots, float* means,
                          float* squares) {
  const auto lanes = [&](const T* row, int vector) {
    return kPartial ? load_partial(row, count) : load(row + vector * kLanes);
  };
  const auto write = [&](float* target, Vec8 value) {
    kPartial ? store_partial(target, value, count) : store(target, value);
  };
  Vec8 pivot[kVectors], total[kVectors] = {}, square[kVectors] = {};
  for (int v = 0; v < kVectors; v++) pivot[v] = lanes(pivots, v);
  for (int64_t position = 0; position < positions; position++)
    for (int v = 0; v < kVectors; v++) total[v] += lanes(x + position * stride, v) - pivot[v];
  for (int v = 0; v < kVectors; v++) {
    total[v] /= static_cast<float>(positions);
    write(means + v * kLanes, total[v]);
    total[v] += pivot[v];
  }
  for (int64_t position = 0; position < positions; position++)
    for (int v = 0; v < kVectors; v++) {
      const Vec8 difference = lanes(x + position * stride, v) - total[v];
      square[v] += difference * difference;
    }
  for (int v = 0; v < kVectors; v++) write(squares + v * kLanes, square[v]);
}

}  // namespace

template <class T>
void groupnorm_statistics_contiguous(const GroupNormStatistics<T>& op, int64_t first_group, int64_t end_group) {
  const int64_t length = op.channels / op.groups * op.positions;
  for (int64_t group = first_group; group < end_group; group++) {
    const Moments moments = moments_of_run(op.x + group * length, length);
    op.mean[group] = moments.mean;
    op.variance[group] = moments.square / length;
  }
}

template <class T>
void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>& op, float* partial, int64_t first_chunk,
                                    int64_t end_chunk) {
  constexpr int64_t kBlock = 4 * kLanes;
  const int64_t C = op.channels, whole = C / kLanes * kLanes;
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const Chunk chunk = chunk_at(number, op.positions);
    const int64_t positions = chunk.end - chunk.first;
    const T *x = op.x + chunk.first * C, *pivots = op.x + chunk.sample * op.positions * C;
    float *means = partial + number * 2 * C, *squares = means + C;
    int64_t i = 0;
    for (; i + kBlock <= whole; i += kBlock)
      chunk_moments<4, false>(x + i, C, positions, kLanes, pivots + i, means + i, squares + i);
    for (; i < whole; i += kLanes)
      chunk_moments<1, false>(x + i, C, positions, kLanes, pivots + i, means + i, squares + i);
    if (i < C) chunk_moments<1, true>(x + i, C, positions, C - i, pivots + i, means + i, squares + i);
  }
}

template <class T>
void groupnorm_statistics_merge(const GroupNormStatistics<T>& op, const float* partial, int64_t first_sample,
                                int64_t end_sample) {
  const int64_t in_group = op.channels / op.groups, chunks = chunks_of(op.positions);
  const double group_size = static_cast<double>(in_group * op.positions);
  for (int64_t sample = first_sample; sample < end_sample; sample++) {
    const T* pivots = op.x + sample * op.positions * op.channels;
    const float* samples_partial = partial + sample * chunks * 2 * op.channels;
    for (int64_t group = 0; group < op.groups; group++) {
      const int64_t begin = group * in_group;
      // `visit` gets the number of values, their mean and their squared differences from it.
      const auto for_each_partial = [&](const auto& visit) {
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
          const double count = std::min(kChunkPositions, op.positions - chunk * kChunkPositions);
          const float *offsets = samples_partial + chunk * 2 * op.channels, *squares = offsets + op.channels;
          for (int64_t channel = begin; channel < begin + in_group; channel++)
            visit(count, static_cast<double>(load_one(pivots + channel)) + offsets[channel], squares[channel]);
        }
      };
      double mean = 0, square = 0;
      for_each_partial([&](double count, double own_mean, double) { mean += count * own_mean; });
      mean /= group_size;
      for_each_partial([&](double count, double own_mean, double own_square) {
        square += own_square + count * (own_mean - mean) * (own_mean - mean);
      });
      op.mean[sample * op.groups + group] = mean;
      op.variance[sample * op.groups + group] = square / group_size;
    }
  }
}

#define K5_INSTANTIATE(T)                                                                                   \
  template void groupnorm_statistics_contiguous(const GroupNormStatistics<T>&, int64_t, int64_t);           \
  template void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>&, float*, int64_t, int64_t);    \
  template void groupnorm_statistics_merge(const GroupNormStatistics<T>&, const float*, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
