#include "groupnorm_silu_backward.h"

#include <algorithm>

#include "lanes.h"

namespace k5::K5_ISA {
namespace {

// How grad_x is written, if at all.
enum class Write { nothing, through_caches, past_caches };

// grad * silu'(z); silu' = s * (1 + z * (1 - s)), s the sigmoid.
inline Vec8 through_silu(Vec8 grad, Vec8 z) {
  const Vec8 s = 1.0f / (exp(-z) + 1.0f);
  return grad * (s * (1.0f + z * (1.0f - s)));
}

// Where the values of a group are near each other, `inverse` is large: what cancels must be rounded alike before it.
template <class Factor>
inline Vec8 x_gradient(Vec8 gradient, Vec8 centred, Factor weight, Factor linear, Factor constant, Factor inverse) {
  return (rounded(gradient * weight) - centred * linear - constant) * inverse;
}

template <bool kSums, Write kWrite, class T>
void channels_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel, int64_t end_channel) {
  // Sums of a piece are kept in float32, those of the whole in float64.
  constexpr int64_t kPiece = 1024;
  for (int64_t number = first_channel; number < end_channel; number++) {
    const int64_t sample = number / op.channels, channel = number % op.channels;
    const float* terms = op.terms + sample * kTerms * op.channels + channel;
    const auto term = [&](Term row) { return terms[row * op.channels]; };
    const float centre = term(kCentre), slope = term(kSlope), bias = term(kBias);
    const float weight = term(kWeight), linear = term(kLinear), constant = term(kConstant), inverse = term(kInverse);
    double sum_of_all = 0, centred_sum_of_all = 0;
    for (int64_t start = 0; start < op.positions; start += kPiece) {
      const int64_t offset = number * op.positions + start, count = std::min(kPiece, op.positions - start);
      const T *grad = op.grad + offset, *x = op.x + offset;
      Vec8 sums[kParts] = {}, centred_sums[kParts] = {};
      for_lanes(count, [&](int64_t i, int part, auto lanes) {
        const Vec8 centred = lanes.get(x + i) - centre;
        const Vec8 gradient = through_silu(lanes.get(grad + i), centred * slope + bias);
        if constexpr (kSums) {
          sums[part] += gradient;
          centred_sums[part] += gradient * centred;
        }
        if constexpr (kWrite != Write::nothing)
          lanes.template set<kWrite == Write::past_caches>(
              op.grad_x + offset + i, x_gradient(gradient, centred, weight, linear, constant, inverse));
      });
      sum_of_all += sum_of_parts(sums);
      centred_sum_of_all += sum_of_parts(centred_sums);
    }
    if constexpr (kSums) {
      float* sums = op.sums + sample * 2 * op.channels + channel;
      sums[0] = static_cast<float>(sum_of_all);
      sums[op.channels] = static_cast<float>(centred_sum_of_all);
    }
  }
  if (kWrite == Write::past_caches) end_of_stream();
}

template <bool kSums, Write kWrite, class T>
void chunks_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk, int64_t end_chunk) {
  const int64_t C = op.channels;
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const PositionsChunk chunk = chunk_at(number, op.positions);
    const float* terms = op.terms + chunk.sample * kTerms * C;
    float* sums = kSums ? op.sums + number * 2 * C : nullptr;
    if constexpr (kSums)
      for (int64_t i = 0; i < 2 * C; i++) sums[i] = 0;
    for (int64_t position = chunk.first; position < chunk.end; position++) {
      const T *grad = op.grad + position * C, *x = op.x + position * C;
      for_lanes(C, [&](int64_t i, int, auto lanes) {
        const auto term = [&](Term row) { return lanes.get(terms + row * C + i); };
        const Vec8 centred = lanes.get(x + i) - term(kCentre);
        const Vec8 gradient = through_silu(lanes.get(grad + i), centred * term(kSlope) + term(kBias));
        if constexpr (kSums) {
          lanes.set(sums + i, lanes.get(sums + i) + gradient);
          lanes.set(sums + C + i, lanes.get(sums + C + i) + gradient * centred);
        }
        if constexpr (kWrite != Write::nothing)
          lanes.template set<kWrite == Write::past_caches>(
              op.grad_x + position * C + i, x_gradient(gradient, centred, term(kWeight), term(kLinear),
                                                       term(kConstant), term(kInverse)));
      });
    }
  }
  if (kWrite == Write::past_caches) end_of_stream();
}

}  // namespace

#define K5_CHOOSE(function, op, first, end)                                                        \
  if (!(op).grad_x) return function<true, Write::nothing>(op, first, end);                         \
  if ((op).past_caches)                                                                            \
    return (op).sums ? function<true, Write::past_caches>(op, first, end)                          \
                     : function<false, Write::past_caches>(op, first, end);                        \
  return (op).sums ? function<true, Write::through_caches>(op, first, end)                         \
                   : function<false, Write::through_caches>(op, first, end);

template <class T>
void groupnorm_silu_backward_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel,
                                        int64_t end_channel) {
  K5_CHOOSE(channels_contiguous, op, first_channel, end_channel)
}

template <class T>
void groupnorm_silu_backward_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk,
                                           int64_t end_chunk) {
  K5_CHOOSE(chunks_channels_last, op, first_chunk, end_chunk)
}

#define K5_INSTANTIATE(T)                                                                                 \
  template void groupnorm_silu_backward_contiguous(const GroupNormSiLUBackward<T>&, int64_t, int64_t);    \
  template void groupnorm_silu_backward_channels_last(const GroupNormSiLUBackward<T>&, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
