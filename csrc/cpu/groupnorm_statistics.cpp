#include "groupnorm_statistics.h"

#include <algorithm>

#include "lanes.h"
#include "pivot.h"
#include "prefetch.h"
#include "scratch.h"

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

// The moments of a dense run, piece by piece. Values near each other in memory, or of one channel, are summed up in one
// pass: x - pivot and its square.
template <class T>
inline Moments moments_of_run(const T* run, int64_t length) {
  constexpr int64_t kPiece = 1024, kAhead = 1024 / sizeof(T);
  const float first = load_one(run);
  Moments moments;
  for (int64_t start = 0; start < length; start += kPiece) {
    const int64_t count = std::min(kPiece, length - start);
    const T* piece = run + start;
    const float pivot = pivot_of(piece, count, first);
    Vec16 totals[kSums] = {}, squares[kSums] = {};
    for_sixteens(count, [&](int64_t i, int part, auto lanes) {
      if (part == 0) __builtin_prefetch(piece + kAhead + i);
      const Vec16 difference = lanes.template keep<T>(lanes.get(piece + i) - pivot);
      totals[part] = totals[part] + difference;
      squares[part] = squares[part] + difference * difference;
    });
    const double total = sum_of_parts(totals);
    moments.merge(count, pivot + total / count, std::max(0.0, sum_of_parts(squares) - total * total / count));
  }
  return moments;
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
  // A chunk stays in the cache while its columns are summed up sixteen by sixteen, sums in registers; the next chunk is
  // fetched meanwhile, in the order of memory.
  const int64_t C = op.channels;
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const PositionsChunk chunk = chunk_at(number, op.positions);
    const int64_t count = chunk.end - chunk.first, of_pivots = pivot_values(count);
    const T *x = op.x + chunk.first * C, *first = op.x + chunk.sample * op.positions * C;
    Prefetch next;
    if (number + 1 < end_chunk && count >= kSums) {
      next.add(x + count * C, 0, 1, count * C);
      next.spread_over(count / kSums * (whole_sixteens(C) / (2 * kLanes)));
    }
    float *means = partial + number * 2 * C, *differences = means + C;
    for_sixteens(C, [&](int64_t i, int, auto lanes) {
      const Vec16 origin = lanes.get(first + i);
      Vec16 pivot_sum = {}, totals[kSums] = {}, squares[kSums] = {};
      for (int64_t position = 0; position < of_pivots; position++)
        pivot_sum = pivot_sum + (lanes.get(x + position * C + i) - origin);
      const Vec16 pivot = origin + pivot_sum * (1.0f / of_pivots);
      const auto add = [&](int64_t position, int part) {
        const Vec16 difference = lanes.get(x + position * C + i) - pivot;
        totals[part] = totals[part] + difference;
        squares[part] = squares[part] + difference * difference;
      };
      int64_t position = 0;
      for (; position + kSums <= count; position += kSums) {
        next.next_lines<kMayDrop>();
        for (int part = 0; part < kSums; part++) add(position + part, part);
      }
      for (; position < count; position++) add(position, 0);
      const Vec16 total = totals[0] + totals[1], mean = total * (1.0f / count);
      lanes.template set_floats<T>(means + i, pivot - origin + mean);
      lanes.template set_floats<T>(differences + i, squares[0] + squares[1] - total * mean);
    });
  }
}

template <class T>
void groupnorm_statistics_merge(const GroupNormStatistics<T>& op, const float* partial, int64_t first_sample,
                                int64_t end_sample) {
  const int64_t C = op.channels, in_group = C / op.groups, chunks = chunks_of(op.positions);
  const double group_size = static_cast<double>(in_group * op.positions);
  const auto count_of = [&](int64_t chunk) {
    return static_cast<double>(std::min(kChunkPositions, op.positions - chunk * kChunkPositions));
  };
  for (int64_t sample = first_sample; sample < end_sample; sample++) {
    const T* pivots = op.x + sample * op.positions * C;
    const float* offsets = partial + sample * chunks * 2 * C;  // means less their pivots, then squared differences
    const Zeroed<double> sums(C), distances(C), squares(C);
    for (int64_t chunk = 0; chunk < chunks; chunk++)
      for (int64_t channel = 0; channel < C; channel++)
        sums.data[channel] += count_of(chunk) * offsets[chunk * 2 * C + channel];
    for (int64_t group = 0; group < op.groups; group++) {
      const int64_t begin = group * in_group;
      double sum = 0;
      for (int64_t channel = begin; channel < begin + in_group; channel++)
        sum += sums.data[channel] + static_cast<double>(load_one(pivots + channel)) * op.positions;
      const double mean = op.mean[sample * op.groups + group] = sum / group_size;
      for (int64_t channel = begin; channel < begin + in_group; channel++)
        distances.data[channel] = static_cast<double>(load_one(pivots + channel)) - mean;
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const double count = count_of(chunk);
      const float *of_chunk = offsets + chunk * 2 * C, *own_squares = of_chunk + C;
      for (int64_t channel = 0; channel < C; channel++) {
        const double distance = distances.data[channel] + of_chunk[channel];
        squares.data[channel] += own_squares[channel] + count * distance * distance;
      }
    }
    for (int64_t group = 0; group < op.groups; group++) {
      double square = 0;
      for (int64_t channel = group * in_group; channel < (group + 1) * in_group; channel++)
        square += squares.data[channel];
      op.variance[sample * op.groups + group] = std::max(0.0, square) / group_size;
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
