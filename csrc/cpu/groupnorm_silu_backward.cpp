#include "groupnorm_silu_backward.h"

#include <algorithm>

#include "lanes.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// How grad_x is written, if at all.
enum class Write { nothing, through_caches, past_caches };

// grad * silu'(z); silu' = s * (1 + z * (1 - s)), s the sigmoid. As exact as sums over what
// belongs to T need.
template <class T>
inline Vec8 through_silu(Vec8 grad, Vec8 z) {
  const Vec8 s = 1.0f / (exp_of_negative_for_sums(static_cast<const T*>(nullptr), z) + 1.0f);
  return grad * (s * (1.0f + z * (1.0f - s)));
}

template <class T>
inline Vec16 through_silu(Vec16 grad, Vec16 z) {
  return {through_silu<T>(grad.first, z.first), through_silu<T>(grad.second, z.second)};
}

// Where the values of a group are near each other, `inverse` is large: what cancels must be rounded alike before it.
template <class Factor>
inline Vec16 x_gradient(Vec16 gradient, Vec16 centred, Factor weight, Factor linear, Factor constant, Factor inverse) {
  return (rounded(gradient * weight) - centred * linear - constant) * inverse;
}

template <bool kAddUp, Write kWrite, class T>
void channels_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel, int64_t end_channel) {
  // Sums of a piece are kept in float32, those of the whole in float64.
  constexpr int64_t kPiece = 1024, kAhead = 1024 / sizeof(T);
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
      Vec16 sums[kSums] = {}, centred_sums[kSums] = {};
      for_sixteens(count, [&](int64_t i, int part, auto lanes) {
        __builtin_prefetch(x + i + kAhead);
        __builtin_prefetch(grad + i + kAhead);
        const Vec16 centred = lanes.get(x + i) - centre;
        const Vec16 gradient = through_silu<T>(lanes.get(grad + i), centred * slope + bias);
        if constexpr (kAddUp) {
          sums[part] = sums[part] + gradient;
          centred_sums[part] = centred_sums[part] + gradient * centred;
        }
        if constexpr (kWrite != Write::nothing)
          lanes.template set<kWrite == Write::past_caches, Ties::away>(
              op.grad_x + offset + i, x_gradient(gradient, centred, weight, linear, constant, inverse));
      });
      sum_of_all += sum_of_parts(sums);
      centred_sum_of_all += sum_of_parts(centred_sums);
    }
    if constexpr (kAddUp) {
      float* sums = op.sums + sample * 2 * op.channels + channel;
      sums[0] = static_cast<float>(sum_of_all);
      sums[op.channels] = static_cast<float>(centred_sum_of_all);
    }
  }
  if (kWrite == Write::past_caches) end_of_stream();
}

template <bool kAddUp, Write kWrite, class T>
void chunks_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk, int64_t end_chunk) {
  constexpr int64_t kAheadPositions = 4;
  const int64_t C = op.channels, row = whole_sixteens(C);
  const ZeroedFloats arranged((kTerms + 2) * row);  // in the order of a row of T
  float *const sums = arranged.data + kTerms * row, *const centred_sums = sums + row;
  int64_t sample = -1;
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const PositionsChunk chunk = chunk_at(number, op.positions);
    if (chunk.sample != sample) {
      sample = chunk.sample;
      for (int64_t term = 0; term < kTerms; term++)
        arrange<T>(arranged.data + term * row, op.terms + (sample * kTerms + term) * C, C);
    }
    for (int64_t position = chunk.first; position < chunk.end; position++) {
      const T *grad = op.grad + position * C, *x = op.x + position * C;
      for_sixteens(C, [&](int64_t i, int, auto lanes) {
        __builtin_prefetch(x + kAheadPositions * C + i);
        __builtin_prefetch(grad + kAheadPositions * C + i);
        const auto term = [&](Term which) { return load_sixteen(arranged.data + which * row + i); };
        const Vec16 centred = lanes.get(x + i) - term(kCentre);
        const Vec16 gradient = through_silu<T>(lanes.get(grad + i), centred * term(kSlope) + term(kBias));
        if constexpr (kAddUp) {
          store_sixteen(sums + i, load_sixteen(sums + i) + gradient);
          store_sixteen(centred_sums + i, load_sixteen(centred_sums + i) + gradient * centred);
        }
        if constexpr (kWrite != Write::nothing)
          lanes.template set<kWrite == Write::past_caches, Ties::away>(
              op.grad_x + position * C + i, x_gradient(gradient, centred, term(kWeight), term(kLinear),
                                                       term(kConstant), term(kInverse)));
      });
    }
    if constexpr (kAddUp)
      for_sixteens(C, [&](int64_t i, int, auto lanes) {
        float* of_chunk = op.sums + number * 2 * C + i;
        lanes.template set_floats<T>(of_chunk, load_sixteen(sums + i));
        lanes.template set_floats<T>(of_chunk + C, load_sixteen(centred_sums + i));
        store_sixteen(sums + i, Vec16{});
        store_sixteen(centred_sums + i, Vec16{});
      });
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
