#include "groupnorm_silu_apply.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "padded_run.h"
#include "prefetch.h"
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
  for_run(positions, [&](int64_t i, auto places) {
    prefetch_values(x + i + kAhead, places.kWidth);
    prefetch_translation(x + i, places.kWidth * sizeof(T));
    if constexpr (kPastCaches) prefetch_translation(out + i, places.kWidth * sizeof(T));
    places.template set<kPastCaches, Ties::away>(out + i, terms.activate<T>(places.get(x + i)));
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

// All channels of positions that follow each other. channels: what `groupnorm_silu_channels` wrote for the sample.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void activate_positions(const GroupNormSiLU<T>& op, const float* channels,
                                                              const T* x, int64_t positions, T* out) {
  const int64_t C = op.channels, row = whole_sixteens(C), together = positions_together<T>(C);
  const float *centres = channels, *slopes = centres + row, *biases = slopes + row;
  for (int64_t first = 0; first < positions; first += together) {
    const int64_t count = std::min(together, positions - first);
    const T* from = x + first * C;
    T* to = out + first * C;
    prefetch_translation(from, count * C * sizeof(T));
    if constexpr (kPastCaches) prefetch_translation(to, count * C * sizeof(T));
    const T* ahead = from + together * C;
    for_thirty_twos<EvenOddThirtyTwo>(C, [=, &ahead](int64_t i, auto lanes) {
      const auto centre = lanes.arranged(centres + i), slope = lanes.arranged(slopes + i);
      const auto bias = lanes.arranged(biases + i);
      for_places(i, count, C, lanes, [=, &ahead](int64_t place, auto places) {
        prefetch_values(ahead, places.kWidth);
        ahead += places.kWidth;
        const auto centred = places.get(from + place) - places.same(centre);
        places.template set<kPastCaches, Ties::away>(to + place,
                                                     silu<T>(centred * places.same(slope) + places.same(bias)));
      });
    });
  }
}

template <bool kPastCaches, class T>
void positions_channels_last(const GroupNormSiLU<T>& op, const float* channels, int64_t first_position,
                             int64_t end_position) {
  for (int64_t position = first_position; position < end_position;) {
    const int64_t sample = position / op.positions, end = std::min(end_position, (sample + 1) * op.positions);
    const float* of_sample = channels + sample * kChannelRows * whole_sixteens(op.channels);
    activate_positions<kPastCaches>(op, of_sample, op.x + position * op.channels, end - position,
                                    op.out + position * op.channels);
    position = end;
  }
  if (kPastCaches) end_of_stream();
}

// A row of the result, from the row of x. A border of columns is computed again from what it copies.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void row_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border,
                                                                    const float* channels, const T* x, T* out) {
  const auto activate = [&](int64_t column, int64_t source, int64_t columns) {
    activate_positions<kPastCaches>(op, channels, x + source * op.channels, columns, out + column * op.channels);
  };
  for (int64_t column = 0; column < border.columns; column++) activate(column, 0, 1);
  activate(border.columns, 0, border.width);
  for (int64_t column = border.columns + border.width; column < border.padded_width(); column++)
    activate(column, border.width - 1, 1);
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

// Rows of the result that follow each other in one channel, written past the caches in whole lines.
template <class T>
void run_past_caches(const ChannelTerms& terms, const Border& border, const T* x, PaddedRow place, int64_t rows,
                     T* out) {
  using Line = std::conditional_t<sizeof(T) == sizeof(float), AllSixteen, EvenOddThirtyTwo>;
  constexpr int64_t kLine = Seam<T>::kLine, kAhead = 1024 / sizeof(T);
  const auto next_row = [&] {
    const T* row = x + place.source(border) * border.width;
    place.advance(border);
    return row;
  };
  const auto fetch = [&](const T* source, T* line) {
    __builtin_prefetch(source + kAhead);
    prefetch_translation(source, kLine * sizeof(T));
    prefetch_translation(line, kLine * sizeof(T));
  };
  const auto whole = [&](const T* source, T* line) {
    fetch(source, line);
    Line{}.template set<true, Ties::away>(line, terms.activate<T>(Line{}.get(source)));
  };
  const auto two = [&](const T* source, const T* next_source, T* line) {
    fetch(source, line);
    fetch(next_source, line + kLine);
    const auto values = terms.activate<T>(Twice{Line{}.get(source), Line{}.get(next_source)});
    Line{}.template set<true, Ties::away>(line, values.first);
    Line{}.template set<true, Ties::away>(line + kLine, values.second);
  };
  const auto part = [&](const T* source, T* target, int64_t first, int64_t end) {
    T line[kLine];
    Line{}.template set<false, Ties::away>(line, terms.activate<T>(Line{}.get(source)));
    std::memcpy(target, line + first, (end - first) * sizeof(T));
  };
  for_lines_of_padded_rows(rows, border.width, border.columns, out, next_row, two, whole, part);
}

// Rows of the result, in the order of memory. What is copied from another frame or row is computed again.
template <class T>
void rows_padded_contiguous(const GroupNormSiLU<T>& op, const Border& border, int64_t first_row, int64_t end_row) {
  const int64_t rows_of_channel = border.padded_frames() * border.padded_height();
  const bool past_caches = op.past_caches && has_whole_lines<T>(border.width, border.columns);
  while (first_row < end_row) {
    PaddedRow place = PaddedRow::at(border, first_row);
    const int64_t number = place.sample;  // its sample is one channel of a sample
    const int64_t end = std::min(end_row, (number + 1) * rows_of_channel);
    const ChannelTerms terms = ChannelTerms::of(op, number / (op.channels / op.groups), number % op.channels);
    const T* x = op.x + number * op.positions;
    T* out = op.out + first_row * border.padded_width();
    if (past_caches) {
      run_past_caches(terms, border, x, place, end - first_row, out);
    } else {
      for (int64_t row = first_row; row < end; row++, place.advance(border), out += border.padded_width())
        row_padded_contiguous(terms, border, x + place.source(border) * border.width, out);
    }
    first_row = end;
  }
  if (past_caches) end_of_stream();
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
    arrange_even_odd<T>(of_sample, centres.data, op.channels);
    arrange_even_odd<T>(of_sample + row, slopes.data, op.channels);
    arrange_even_odd<T>(of_sample + 2 * row, biases.data, op.channels);
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
  rows_padded_contiguous(op, border, first_row, end_row);
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
