#include "groupnorm_silu_apply.h"

#include <cmath>

#include "lanes.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// As exact as results of type T need.
template <class T>
inline Vec8 silu(Vec8 value) {
  return value / (exp_of_negative_for(static_cast<const T*>(nullptr), value) + 1.0f);
}

template <class T>
inline Vec16 silu(Vec16 value) {
  return {silu<T>(value.first), silu<T>(value.second)};
}

// What one channel of a sample is multiplied by and what is added. NaNs are plain for the sake of Ties::away.
struct ChannelTerms {
  float mean, slope, bias;

  template <class T>
  static ChannelTerms of(const GroupNormSiLU<T>& op, int64_t group, int64_t channel) {
    const float inverse_deviation = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps));
    return {with_plain_nan(static_cast<float>(op.mean[group])),
            with_plain_nan(inverse_deviation * op.weight[channel]), with_plain_nan(op.bias[channel])};
  }

  template <class T>
  __attribute__((always_inline)) Vec16 activate(Vec16 x) const {
    return silu<T>((x - mean) * slope + bias);
  }
};

template <bool kPastCaches, class T>
void groups_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group) {
  constexpr int64_t kAhead = 1024 / sizeof(T);
  const int64_t in_group = op.channels / op.groups;
  for (int64_t number = first_group * in_group; number < end_group * in_group; number++) {
    const ChannelTerms terms = ChannelTerms::of(op, number / in_group, number % op.channels);
    const T* x = op.x + number * op.positions;
    T* out = op.out + number * op.positions;
    for_sixteens(op.positions, [&](int64_t i, int, auto lanes) {
      __builtin_prefetch(x + i + kAhead);
      lanes.template set<kPastCaches, Ties::away>(out + i, terms.activate<T>(lanes.get(x + i)));
    });
  }
  if (kPastCaches) end_of_stream();
}

constexpr int64_t kAheadPositions = 4;

// One position of all channels. channels: what `groupnorm_silu_channels` wrote for the sample.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void position_channels_last(const GroupNormSiLU<T>& op, const float* channels,
                                                                  const T* x, T* out) {
  const int64_t row = whole_sixteens(op.channels);
  const float *centres = channels, *slopes = centres + row, *biases = slopes + row;
  for_sixteens(op.channels, [&](int64_t i, int, auto lanes) {
    __builtin_prefetch(x + kAheadPositions * op.channels + i);
    const Vec16 centred = lanes.get(x + i) - load_sixteen(centres + i);
    const Vec16 value = centred * load_sixteen(slopes + i) + load_sixteen(biases + i);
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

// A border is computed again from what it copies: that reads as many bytes as a copy of the result would.
template <bool kPastCaches, class T>
void rows_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border, const float* channels,
                               int64_t first_row, int64_t end_row) {
  for (int64_t row = first_row; row < end_row; row++) {
    const SourceRow source = source_row(border, row);
    const float* of_sample = channels + source.sample * kChannelRows * whole_sixteens(op.channels);
    const T* x = op.x + (source.sample * op.positions + source.row * border.width) * op.channels;
    T* out = op.out + row * border.padded_width() * op.channels;
    for (int64_t column = -border.columns; column < border.width + border.columns; column++, out += op.channels)
      position_channels_last<kPastCaches>(op, of_sample, x + clamp_to(column, border.width) * op.channels, out);
  }
  if (kPastCaches) end_of_stream();
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
  constexpr int64_t kAhead = 1024 / sizeof(T);
  const int64_t width = border.width, columns = border.columns;
  ChannelTerms terms{};
  int64_t sample = -1;
  for (int64_t row = first_row; row < end_row; row++) {
    const SourceRow source = source_row(border, row);  // its sample is one channel of a sample
    if (source.sample != sample) {
      sample = source.sample;
      terms = ChannelTerms::of(op, sample / (op.channels / op.groups), sample % op.channels);
    }
    const T* x = op.x + source.sample * op.positions + source.row * width;
    T* out = op.out + row * border.padded_width() + columns;
    for_sixteens(width, [&](int64_t i, int, auto lanes) {
      __builtin_prefetch(x + i + kAhead);
      lanes.template set<false, Ties::away>(out + i, terms.activate<T>(lanes.get(x + i)));
    });
    for (int64_t i = 1; i <= columns; i++) {
      out[-i] = out[0];
      out[width - 1 + i] = out[width - 1];
    }
  }
}

template <class T>
void groupnorm_silu_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border, const float* channels,
                                         int64_t first_row, int64_t end_row) {
  op.past_caches ? rows_padded_channels_last<true>(op, border, channels, first_row, end_row)
                 : rows_padded_channels_last<false>(op, border, channels, first_row, end_row);
}

#define K5_INSTANTIATE(T)                                                                \
  template void groupnorm_silu_contiguous(const GroupNormSiLU<T>&, int64_t, int64_t);    \
  template void groupnorm_silu_channels(const GroupNormSiLU<T>&, float*, int64_t, int64_t); \
  template void groupnorm_silu_channels_last(const GroupNormSiLU<T>&, const float*, int64_t, int64_t);    \
  template void groupnorm_silu_padded_contiguous(const GroupNormSiLU<T>&, const Border&, int64_t, int64_t); \
  template void groupnorm_silu_padded_channels_last(const GroupNormSiLU<T>&, const Border&, const float*, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
