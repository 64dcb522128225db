#include "groupnorm_silu_apply.h"

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "prefetch.h"
#include "rows_past_caches.h"
#include "scratch.h"
#include "silu.h"

namespace k5::K5_ISA {
namespace {

// What one channel of a sample is multiplied by and what is added, for `silu` of silu.h. NaNs are plain for the sake of
// Ties::away.
struct ChannelTerms {
  float mean, slope, bias;

  template <class T>
  static ChannelTerms of(const GroupNormSiLU<T>& op, int64_t group, int64_t channel) {
    const float inverse_deviation = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps));
    return {with_plain_nan(static_cast<float>(op.mean[group])),
            with_plain_nan(inverse_deviation * op.weight[channel] * kScaleOfZ<T>),
            with_plain_nan(op.bias[channel] * kScaleOfZ<T>)};
  }

  template <class T, class V>
  __attribute__((always_inline)) V activate(V x) const {
    return silu<T>((x - mean) * slope + bias);
  }
};

// Positions of one channel that follow each other in memory.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void activate_run(const ChannelTerms& terms, const T* x, int64_t positions,
                                                        T* out) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  for_thirty_twos(positions, [&](int64_t i, auto lanes) {
    prefetch_thirty_two(x + i + kAhead);
    prefetch_translation(x + i, 32 * sizeof(T));
    if constexpr (kPastCaches) prefetch_translation(out + i, 32 * sizeof(T));
    lanes.template set<kPastCaches, Ties::away>(out + i, terms.activate<T>(lanes.get(x + i)));
  });
}

template <bool kPastCaches, class T>
void groups_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group) {
  const int64_t in_group = op.channels / op.groups;
  for (int64_t number = first_group * in_group; number < end_group * in_group; number++) {
    const ChannelTerms terms = ChannelTerms::of(op, number / in_group, number % op.channels);
    activate_run<kPastCaches>(terms, op.x + number * op.positions, op.positions, op.out + number * op.positions);
  }
  if (kPastCaches) end_of_stream();
}

// One position of all channels. channels: what `groupnorm_silu_channels` wrote for the sample.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void position_channels_last(const GroupNormSiLU<T>& op, const float* channels,
                                                                  const T* x, T* out) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  const int64_t row = whole_sixteens(op.channels), bytes = op.channels * sizeof(T);
  prefetch_translation(x, bytes);
  if constexpr (kPastCaches) prefetch_translation(out, bytes);
  const float *centres = channels, *slopes = centres + row, *biases = slopes + row;
  for_thirty_twos(op.channels, [&](int64_t i, auto lanes) {
    prefetch_thirty_two(x + i + kAhead);
    const auto centred = lanes.get(x + i) - lanes.arranged(centres + i);
    const auto value = centred * lanes.arranged(slopes + i) + lanes.arranged(biases + i);
    lanes.template set<kPastCaches, Ties::away>(out + i, silu<T>(value));
  });
}

template <bool kPastCaches, class T>
void positions_channels_last(const GroupNormSiLU<T>& op, const float* channels, int64_t first_position,
                             int64_t end_position) {
  for (int64_t position = first_position; position < end_position; position++) {
    const float* of_sample = channels + position / op.positions * kChannelRows * whole_sixteens(op.channels);
    position_channels_last<kPastCaches>(op, of_sample, op.x + position * op.channels, op.out + position * op.channels);
  }
  if (kPastCaches) end_of_stream();
}

// A row of the result, from the row of x. A border of columns is computed again from what it copies.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void row_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border,
                                                                    const float* channels, const T* x, T* out) {
  for (int64_t column = -border.columns; column < border.width + border.columns; column++, out += op.channels)
    position_channels_last<kPastCaches>(op, channels, x + clamp_to(column, border.width) * op.channels, out);
}

template <bool kPastCaches, class T>
inline void copy_row(T* target, const T* row, int64_t length) {
  if constexpr (kPastCaches) {
    stream_bytes(target, row, length * sizeof(T));
  } else {
    std::memcpy(target, row, length * sizeof(T));
  }
}

// A row that has copies is written to all of them while it is in the cache.
template <bool kPastCaches, class T>
void rows_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border, const float* channels,
                               int64_t first_row, int64_t end_row) {
  const int64_t length = border.padded_width() * op.channels;
  const Zeroed<T> kept(length);
  for (int64_t number = first_row; number < end_row; number++) {
    const int64_t row = number % border.height, frame = number / border.height % border.frames;
    const int64_t sample = number / (border.height * border.frames);
    const float* of_sample = channels + sample * kChannelRows * whole_sixteens(op.channels);
    const T* x = op.x + number * border.width * op.channels;
    T* out = op.out + sample * border.padded_frames() * border.padded_height() * length;
    const Copies frames = border.copies_of_frame(frame), rows = border.copies_of_row(row);
    const auto target = [&](int64_t i, int64_t j) { return out + (i * border.padded_height() + j) * length; };
    if (frames.count() * rows.count() == 1) {
      row_padded_channels_last<kPastCaches>(op, border, of_sample, x, target(frames.first, rows.first));
      continue;
    }
    row_padded_channels_last<false>(op, border, of_sample, x, kept.data);
    for (int64_t i = frames.first; i < frames.end; i++)
      for (int64_t j = rows.first; j < rows.end; j++) copy_row<kPastCaches>(target(i, j), kept.data, length);
  }
  if (kPastCaches) end_of_stream();
}

// One row of a channel with copies of its ends, from the row of x.
template <class T>
inline __attribute__((always_inline)) void row_padded_contiguous(const ChannelTerms& terms, const Border& border,
                                                                 const T* x, T* out) {
  T* inner = out + border.columns;
  activate_run<false>(terms, x, border.width, inner);
  for (int64_t i = 1; i <= border.columns; i++) {
    inner[-i] = inner[0];
    inner[border.width - 1 + i] = inner[border.width - 1];
  }
}

// Where rows of the result go that may stay in the caches.
template <class T>
struct Rows {
  T* next;
  int64_t width;
  T* place() const { return next; }
  void advance() { next += width; }
  void end() const {}
};

// Rows of the result in the order of memory. Those of the first frame are kept for its copies.
template <class T, class Target>
void rows_padded_contiguous(const GroupNormSiLU<T>& op, const Border& border, int64_t first_row, int64_t end_row,
                            Target target) {
  const int64_t width = border.padded_width(), rows_to_keep = border.before > 0 ? border.height : 0;
  const Zeroed<T> kept(rows_to_keep * width);
  const Zeroed<bool> is_kept(rows_to_keep);
  PaddedRow place = PaddedRow::at(border, first_row);  // its sample is one channel of a sample
  ChannelTerms terms{};
  int64_t sample = -1;
  for (int64_t row = first_row; row < end_row; row++, place.advance(border)) {
    if (place.sample != sample) {
      sample = place.sample;
      terms = ChannelTerms::of(op, sample / (op.channels / op.groups), sample % op.channels);
      std::memset(is_kept.data, 0, rows_to_keep);
    }
    const int64_t source = place.source(border);
    const T* x = op.x + sample * op.positions + source * border.width;
    if (source < rows_to_keep) {
      T* own = kept.data + source * width;
      if (!is_kept.data[source]) row_padded_contiguous(terms, border, x, own);
      is_kept.data[source] = true;
      std::memcpy(target.place(), own, width * sizeof(T));
    } else {
      row_padded_contiguous(terms, border, x, target.place());
    }
    target.advance();
  }
  target.end();
}

}  // namespace

template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group) {
  op.past_caches ? groups_contiguous<true>(op, first_group, end_group)
                 : groups_contiguous<false>(op, first_group, end_group);
}

template <class T>
void groupnorm_silu_channels(const GroupNormSiLU<T>& op, float* channels, int64_t first_sample, int64_t end_sample) {
  const int64_t in_group = op.channels / op.groups, row = whole_sixteens(op.channels);
  const ZeroedFloats centres(op.channels), slopes(op.channels), biases(op.channels);
  for (int64_t sample = first_sample; sample < end_sample; sample++) {
    for (int64_t channel = 0; channel < op.channels; channel++) {
      const ChannelTerms terms = ChannelTerms::of(op, sample * op.groups + channel / in_group, channel);
      centres.data[channel] = terms.mean;
      slopes.data[channel] = terms.slope;
      biases.data[channel] = terms.bias;
    }
    float* of_sample = channels + sample * kChannelRows * row;
    arrange<T>(of_sample, centres.data, op.channels);
    arrange<T>(of_sample + row, slopes.data, op.channels);
    arrange<T>(of_sample + 2 * row, biases.data, op.channels);
  }
}

template <class T>
void groupnorm_silu_channels_last(const GroupNormSiLU<T>& op, const float* channels, int64_t first_position,
                                  int64_t end_position) {
  op.past_caches ? positions_channels_last<true>(op, channels, first_position, end_position)
                 : positions_channels_last<false>(op, channels, first_position, end_position);
}

template <class T>
void groupnorm_silu_padded_contiguous(const GroupNormSiLU<T>& op, const Border& border, int64_t first_row,
                                      int64_t end_row) {
  const int64_t width = border.padded_width();
  T* out = op.out + first_row * width;
  op.past_caches ? rows_padded_contiguous(op, border, first_row, end_row, RowsPastCaches<T>(out, width))
                 : rows_padded_contiguous(op, border, first_row, end_row, Rows<T>{out, width});
}

template <class T>
void groupnorm_silu_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border, const float* channels,
                                         int64_t first_row, int64_t end_row) {
  op.past_caches ? rows_padded_channels_last<true>(op, border, channels, first_row, end_row)
                 : rows_padded_channels_last<false>(op, border, channels, first_row, end_row);
}

#define K5_INSTANTIATE(T)                                                                                   \
  template void groupnorm_silu_contiguous(const GroupNormSiLU<T>&, int64_t, int64_t);                       \
  template void groupnorm_silu_channels(const GroupNormSiLU<T>&, float*, int64_t, int64_t);                 \
  template void groupnorm_silu_channels_last(const GroupNormSiLU<T>&, const float*, int64_t, int64_t);      \
  template void groupnorm_silu_padded_contiguous(const GroupNormSiLU<T>&, const Border&, int64_t, int64_t); \
  template void groupnorm_silu_padded_channels_last(const GroupNormSiLU<T>&, const Border&, const float*, int64_t, \
                                                    int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
