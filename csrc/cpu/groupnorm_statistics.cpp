#include "groupnorm_statistics.h"

#include <algorithm>

#include "lanes.h"
#include "prefetch.h"

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

// Fetches the chunk that follows while this one is read again from the cache.
template <class T>
inline void prefetch_row(const T* row, int64_t width) {
  for (const char *line = reinterpret_cast<const char*>(row), *end = reinterpret_cast<const char*>(row + width);
       line < end; line += 64)
    __builtin_prefetch(line, 0, kMayDrop);
}

template <bool kPastCaches, class T>
void gradient_contiguous(const GroupNormStatisticsBackward<T>& op, int64_t first_channel, int64_t end_channel) {
  for (int64_t number = first_channel; number < end_channel; number++) {
    const int64_t sample = number / op.channels, channel = number % op.channels;
    const float* terms = op.terms + sample * 3 * op.channels + channel;
    const float centre = terms[0], linear = terms[op.channels], constant = terms[2 * op.channels];
    const T* x = op.x + number * op.positions;
    T* grad_x = op.grad_x + number * op.positions;
    for_lanes(op.positions, [&](int64_t i, int, auto lanes) {
      lanes.template set<kPastCaches>(grad_x + i, (lanes.get(x + i) - centre) * linear + constant);
    });
  }
  if (kPastCaches) end_of_stream();
}

template <bool kPastCaches, class T>
void gradient_channels_last(const GroupNormStatisticsBackward<T>& op, int64_t first_position, int64_t end_position) {
  const int64_t C = op.channels;
  for (int64_t position = first_position; position < end_position; position++) {
    const float* terms = op.terms + position / op.positions * 3 * C;
    const T* x = op.x + position * C;
    T* grad_x = op.grad_x + position * C;
    for_lanes(C, [&](int64_t i, int, auto lanes) {
      const Vec8 centred = lanes.get(x + i) - lanes.get(terms + i);
      lanes.template set<kPastCaches>(grad_x + i, centred * lanes.get(terms + C + i) + lanes.get(terms + 2 * C + i));
    });
  }
  if (kPastCaches) end_of_stream();
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
  const int64_t C = op.channels;
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const PositionsChunk chunk = chunk_at(number, op.positions);
    const int64_t positions = chunk.end - chunk.first;
    const T *first = op.x + chunk.first * C, *pivots = op.x + chunk.sample * op.positions * C;
    float *means = partial + number * 2 * C, *squares = means + C;
    for (int64_t i = 0; i < 2 * C; i++) means[i] = 0;
    for (int64_t position = 0; position < positions; position++) {
      const T* x = first + position * C;
      for_lanes(C, [&](int64_t i, int, auto lanes) {
        lanes.set(means + i, lanes.get(means + i) + (lanes.get(x + i) - lanes.get(pivots + i)));
      });
    }
    for_lanes(C, [&](int64_t i, int, auto lanes) {
      lanes.set(means + i, lanes.get(means + i) / static_cast<float>(positions));
    });
    for (int64_t position = 0; position < positions; position++) {
      const T* x = first + position * C;
      if (number + 1 < end_chunk) prefetch_row(x + positions * C, C);
      for_lanes(C, [&](int64_t i, int, auto lanes) {
        const Vec8 difference = lanes.get(x + i) - (lanes.get(means + i) + lanes.get(pivots + i));
        lanes.set(squares + i, lanes.get(squares + i) + difference * difference);
      });
    }
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

template <class T>
void groupnorm_statistics_backward_contiguous(const GroupNormStatisticsBackward<T>& op, int64_t first_channel,
                                              int64_t end_channel) {
  op.past_caches ? gradient_contiguous<true>(op, first_channel, end_channel)
                 : gradient_contiguous<false>(op, first_channel, end_channel);
}

template <class T>
void groupnorm_statistics_backward_channels_last(const GroupNormStatisticsBackward<T>& op, int64_t first_position,
                                                 int64_t end_position) {
  op.past_caches ? gradient_channels_last<true>(op, first_position, end_position)
                 : gradient_channels_last<false>(op, first_position, end_position);
}

#define K5_INSTANTIATE(T)                                                                                   \
  template void groupnorm_statistics_contiguous(const GroupNormStatistics<T>&, int64_t, int64_t);           \
  template void groupnorm_statistics_of_chunks(const GroupNormStatistics<T>&, float*, int64_t, int64_t);    \
  template void groupnorm_statistics_merge(const GroupNormStatistics<T>&, const float*, int64_t, int64_t);  \
  template void groupnorm_statistics_backward_contiguous(const GroupNormStatisticsBackward<T>&, int64_t, int64_t); \
  template void groupnorm_statistics_backward_channels_last(const GroupNormStatisticsBackward<T>&, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
