#include "groupnorm_silu_apply.h"

#include <cmath>

namespace k5::K5_ISA {
namespace {

inline Vec8 silu(Vec8 value) { return value / (exp(-value) + 1.0f); }

template <class T>
inline void normalize_run(const T* x, T* out, int64_t length, float mean, float slope, float bias) {
  const auto activated = [&](Vec8 value) { return silu((value - mean) * slope + bias); };
  const int64_t whole = length / kLanes * kLanes, rest = length - whole;
  for (int64_t i = 0; i < whole; i += kLanes) store(out + i, activated(load(x + i)));
  if (rest) store_partial(out + whole, activated(load_partial(x + whole, rest)), rest);
}

}  // namespace

template <class T>
void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group) {
  const int64_t in_group = op.channels / op.groups, length = in_group * op.positions;
  for (int64_t group = first_group; group < end_group; group++) {
    const float mean = static_cast<float>(op.mean[group]);
    const float inverse_deviation = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps));
    for (int64_t i = 0; i < in_group; i++) {
      const int64_t channel = group % op.groups * in_group + i, offset = group * length + i * op.positions;
      normalize_run(op.x + offset, op.out + offset, op.positions, mean, inverse_deviation * op.weight[channel],
                    op.bias[channel]);
    }
  }
}

template <class T>
void groupnorm_silu_slopes(const GroupNormSiLU<T>& op, float* centres_slopes, int64_t first_sample,
                           int64_t end_sample) {
  const int64_t in_group = op.channels / op.groups;
  for (int64_t sample = first_sample; sample < end_sample; sample++) {
    float *centres = centres_slopes + sample * 2 * op.channels, *slopes = centres + op.channels;
    for (int64_t channel = 0; channel < op.channels; channel++) {
      const int64_t group = sample * op.groups + channel / in_group;
      centres[channel] = static_cast<float>(op.mean[group]);
      slopes[channel] = static_cast<float>(1 / std::sqrt(op.variance[group] + op.eps) * op.weight[channel]);
    }
  }
}

template <class T>
void groupnorm_silu_channels_last(const GroupNormSiLU<T>& op, const float* centres_slopes, int64_t first_position,
                                  int64_t end_position) {
  const int64_t whole = op.channels / kLanes * kLanes, rest = op.channels - whole;
  for (int64_t position = first_position; position < end_position; position++) {
    const float *centres = centres_slopes + position / op.positions * 2 * op.channels, *slopes = centres + op.channels;
    const T* x = op.x + position * op.channels;
    T* out = op.out + position * op.channels;
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, silu((load(x + i) - load(centres + i)) * load(slopes + i) + load(op.bias + i)));
    if (rest) {
      const Vec8 centred = load_partial(x + whole, rest) - load_partial(centres + whole, rest);
      store_partial(out + whole,
                    silu(centred * load_partial(slopes + whole, rest) + load_partial(op.bias + whole, rest)), rest);
    }
  }
}

#define K5_INSTANTIATE(T)                                                                \
  template void groupnorm_silu_contiguous(const GroupNormSiLU<T>&, int64_t, int64_t);    \
  template void groupnorm_silu_slopes(const GroupNormSiLU<T>&, float*, int64_t, int64_t); \
  template void groupnorm_silu_channels_last(const GroupNormSiLU<T>&, const float*, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
