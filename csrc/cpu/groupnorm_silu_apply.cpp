#include "groupnorm_silu_apply.h"

#include <cmath>

#include "lanes.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// As exact as results of type T need.
template <class T>
inline Vec8 silu(Vec8 value) {
  return value / (exp_for(static_cast<const T*>(nullptr), -value) + 1.0f);
}

template <class T>
inline Vec16 silu(Vec16 value) {
  return {silu<T>(value.first), silu<T>(value.second)};
}

template <bool kPastCaches, class T>
void groups_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group) {
  const int64_t in_group = op.channels / op.groups, length = in_group * op.positions;
  for (int64_t group = first_group; group < end_group; group++) {
    const float mean = static_cast<float>(op.mean[group]);
    const float inverse_deviation = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps));
    for (int64_t i = 0; i < in_group; i++) {
      const int64_t channel = group % op.groups * in_group + i, offset = group * length + i * op.positions;
      const float slope = inverse_deviation * op.weight[channel], bias = op.bias[channel];
      for_sixteens(op.positions, [&](int64_t i, int, auto lanes) {
        const Vec16 centred = lanes.get(op.x + offset + i) - mean;
        lanes.template set<kPastCaches>(op.out + offset + i, silu<T>(centred * slope + bias));
      });
    }
  }
  if (kPastCaches) end_of_stream();
}

// One position of all channels. channels: what `groupnorm_silu_channels` wrote for the sample.
template <bool kPastCaches, class T>
inline __attribute__((always_inline)) void position_channels_last(const GroupNormSiLU<T>& op, const float* channels,
                                                                  const T* x, T* out) {
  const int64_t row = whole_sixteens(op.channels);
  const float *centres = channels, *slopes = centres + row, *biases = slopes + row;
  for_sixteens(op.channels, [&](int64_t i, int, auto lanes) {
    const Vec16 centred = lanes.get(x + i) - load_sixteen(centres + i);
    lanes.template set<kPastCaches>(out + i, silu<T>(centred * load_sixteen(slopes + i) + load_sixteen(biases + i)));
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
  const ZeroedFloats centres(op.channels), slopes(op.channels);
  for (int64_t sample = first_sample; sample < end_sample; sample++) {
    for (int64_t channel = 0; channel < op.channels; channel++) {
      const int64_t group = sample * op.groups + channel / in_group;
      centres.data[channel] = static_cast<float>(op.mean[group]);
      slopes.data[channel] = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps)) * op.weight[channel];
    }
    float* of_sample = channels + sample * kChannelRows * row;
    arrange<T>(of_sample, centres.data, op.channels);
    arrange<T>(of_sample + row, slopes.data, op.channels);
    arrange<T>(of_sample + 2 * row, op.bias, op.channels);
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
  const int64_t width = border.width, columns = border.columns;
  for (int64_t row = first_row; row < end_row; row++) {
    const SourceRow source = source_row(border, row);  // its sample is one channel of a sample
    const int64_t channel = source.sample % op.channels, group = source.sample / (op.channels / op.groups);
    const float mean = static_cast<float>(op.mean[group]);
    const float slope = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps)) * op.weight[channel];
    const T* x = op.x + source.sample * op.positions + source.row * width;
    T* out = op.out + row * border.padded_width() + columns;
    for_sixteens(width, [&](int64_t i, int, auto lanes) {
      lanes.template set<false>(out + i, silu<T>((lanes.get(x + i) - mean) * slope + op.bias[channel]));
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
