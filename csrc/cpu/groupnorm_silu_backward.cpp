#include "groupnorm_silu_backward.h"

#include <algorithm>

#include "lanes.h"
#include "prefetch.h"
#include "scratch.h"
#include "silu.h"

namespace k5::K5_ISA {
namespace {

// How grad_x is written, if at all.
enum class Write { nothing, through_caches, past_caches };

// grad * silu'(z) * kScaleOfGradient<T>, for `scaled` as in silu.h; silu' = s * (1 + z * (1 - s)), s the sigmoid. As
// exact as sums over what belongs to T need.
template <class T, class V>
inline __attribute__((always_inline)) V through_silu(V grad, V scaled) {
  constexpr float kScale = kScaleOfGradient<T>;
  if constexpr (sizeof(T) == sizeof(float)) {
    const V s = 1.0f / (exp(-scaled) + 1.0f);
    return grad * (s * (scaled * (1.0f - s) + 1.0f));
  }
  const V s = kScale / (rough_exp2<5>(scaled) + 1.0f);
  return (grad * s) * (scaled * (s - kScale) + 1.0f);
}

// Where the values of a group are near each other, `inverse` is large: what cancels must be rounded alike before it.
template <class V, class Factor>
inline V x_gradient(V gradient, V centred, Factor weight, Factor linear, Factor constant, Factor inverse) {
  return (rounded(gradient * weight) - centred * linear - constant) * inverse;
}

inline void add_to(Vec32& sums, Vec32 values) { sums = sums + values; }
inline void add_to(Vec32& sums, Vec16 values) { sums.first = sums.first + values; }

template <bool kAddUp, Write kWrite, class T>
void channels_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel, int64_t end_channel) {
  // Sums of a piece are kept in float32, those of the whole in float64.
  constexpr int64_t kPiece = 1024, kAhead = 1024 / sizeof(T);
  for (int64_t number = first_channel; number < end_channel; number++) {
    const int64_t sample = number / op.channels, channel = number % op.channels;
    const float* terms = op.terms + sample * kTerms * op.channels + channel;
    const auto term = [&](Term row) { return terms[row * op.channels]; };
    const float centre = term(kCentre), slope = term(kSlope) * kScaleOfZ<T>, bias = term(kBias) * kScaleOfZ<T>;
    const float weight = term(kWeight), linear = term(kLinear), constant = term(kConstant), inverse = term(kInverse);
    double sum_of_all = 0, centred_sum_of_all = 0;
    for (int64_t start = 0; start < op.positions; start += kPiece) {
      const int64_t offset = number * op.positions + start, count = std::min(kPiece, op.positions - start);
      const T *grad = op.grad + offset, *x = op.x + offset;
      Vec32 sums{}, centred_sums{};
      for_run(count, [&](int64_t i, auto places) {
        prefetch_values(x + i + kAhead, places.kWidth);
        prefetch_values(grad + i + kAhead, places.kWidth);
        if constexpr (kWrite == Write::past_caches)
          prefetch_translation(op.grad_x + offset + i, places.kWidth * sizeof(T));
        const auto centred = places.get(x + i) - centre;
        const auto gradient = through_silu<T>(places.get(grad + i), centred * slope + bias);
        if constexpr (kAddUp) {
          add_to(sums, places.sum(gradient));
          add_to(centred_sums, places.sum(gradient * centred));
        }
        if constexpr (kWrite != Write::nothing)
          places.template set<kWrite == Write::past_caches, Ties::away>(
              op.grad_x + offset + i, x_gradient(gradient, centred, weight, linear, constant, inverse));
      });
      sum_of_all += sum(sums);
      centred_sum_of_all += sum(centred_sums);
    }
    if constexpr (kAddUp) {
      float* sums = op.sums + sample * 2 * op.channels + channel;
      sums[0] = static_cast<float>(sum_of_all);
      sums[op.channels] = static_cast<float>(centred_sum_of_all);
    }
  }
  if (kWrite == Write::past_caches) end_of_stream();
}

// The terms of a sample in the order of EvenOddThirtyTwo; slope and bias as `through_silu` takes them.
template <class T>
class ArrangedTerms {
 public:
  ArrangedTerms(const float* terms, int64_t channels)
      : terms_(terms), channels_(channels), row_(whole_sixteens(channels)), arranged_(kTerms * row_) {}

  void set_sample(int64_t sample) {
    if (sample == sample_) return;
    sample_ = sample;
    for (int64_t term = 0; term < kTerms; term++)
      arrange_even_odd<T>(arranged_.data + term * row_, terms_ + (sample * kTerms + term) * channels_, channels_);
    for (const Term term : {kSlope, kBias})
      for (int64_t i = 0; i < row_; i++) arranged_.data[term * row_ + i] *= kScaleOfZ<T>;
  }

  const float* row(Term term) const { return arranged_.data + term * row_; }

 private:
  const float* const terms_;
  const int64_t channels_, row_;
  const ZeroedFloats arranged_;
  int64_t sample_ = -1;
};

// The gradient of x where kWrite says so, and the sums of each chunk where asked for.
template <bool kAddUp, Write kWrite, class T>
void chunks_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk, int64_t end_chunk) {
  const int64_t C = op.channels, together = positions_together<T>(C);
  ArrangedTerms<T> terms(op.terms, C);
  const float *const centre = terms.row(kCentre), *const slope = terms.row(kSlope), *const bias = terms.row(kBias);
  const float *const weight = terms.row(kWeight), *const linear = terms.row(kLinear);
  const float *const constant = terms.row(kConstant), *const inverse = terms.row(kInverse);
  const ZeroedFloats of_chunk(2 * whole_sixteens(C));
  float *const sums = of_chunk.data, *const centred_sums = sums + whole_sixteens(C);
  for (int64_t number = first_chunk; number < end_chunk; number++) {
    const PositionsChunk chunk = chunk_at(number, op.positions);
    terms.set_sample(chunk.sample);
    for (int64_t position = chunk.first; position < chunk.end; position += together) {
      const int64_t count = std::min(together, chunk.end - position);
      const T *const grad = op.grad + position * C, *const x = op.x + position * C;
      T* const grad_x = kWrite == Write::nothing ? nullptr : op.grad_x + position * C;
      prefetch_translation(x, count * C * sizeof(T));
      prefetch_translation(grad, count * C * sizeof(T));
      if constexpr (kWrite == Write::past_caches) prefetch_translation(grad_x, count * C * sizeof(T));
      int64_t ahead = together * C;
      for_thirty_twos<EvenOddThirtyTwo>(C, [=, &ahead](int64_t i, auto lanes) {
        const auto of_channel = [=](const float* term) { return lanes.arranged(term + i); };
        const auto centres = of_channel(centre), slopes = of_channel(slope), biases = of_channel(bias);
        auto sum = of_channel(sums), centred_sum = of_channel(centred_sums);
        for_places(i, count, C, lanes, [=, &ahead, &sum, &centred_sum](int64_t place, auto places) {
          prefetch_values(x + ahead, places.kWidth);
          prefetch_values(grad + ahead, places.kWidth);
          ahead += places.kWidth;
          const auto term = [=](const float* row) { return places.same(of_channel(row)); };
          const auto centred = places.get(x + place) - places.same(centres);
          const auto gradient =
              through_silu<T>(places.get(grad + place), centred * places.same(slopes) + places.same(biases));
          if constexpr (kAddUp) {
            sum = sum + places.sum(gradient);
            centred_sum = centred_sum + places.sum(gradient * centred);
          }
          if constexpr (kWrite != Write::nothing)
            places.template set<kWrite == Write::past_caches, Ties::away>(
                grad_x + place,
                x_gradient(gradient, centred, term(weight), term(linear), term(constant), term(inverse)));
        });
        if constexpr (kAddUp) {
          lanes.set_arranged(sums + i, sum);
          lanes.set_arranged(centred_sums + i, centred_sum);
        }
      });
    }
    if constexpr (kAddUp)
      for_thirty_twos<EvenOddThirtyTwo>(C, [&](int64_t i, auto lanes) {
        float* target = op.sums + number * 2 * C + i;
        const auto take = [=](float* of_chunk, float* target) {
          auto values = lanes.arranged(of_chunk + i);
          lanes.template set_floats<T>(target, values);
          lanes.set_arranged(of_chunk + i, decltype(values){});
        };
        take(sums, target);
        take(centred_sums, target + C);
      });
  }
  if (kWrite == Write::past_caches) end_of_stream();
}

// Calls run<kAddUp, kWrite>() as the operator asks for.
template <class T, class Run>
void as_asked(const GroupNormSiLUBackward<T>& op, const Run& run) {
  if (!op.grad_x) return run.template operator()<true, Write::nothing>();
  if (op.past_caches)
    return op.sums ? run.template operator()<true, Write::past_caches>()
                   : run.template operator()<false, Write::past_caches>();
  return op.sums ? run.template operator()<true, Write::through_caches>()
                 : run.template operator()<false, Write::through_caches>();
}

}  // namespace

template <class T>
void groupnorm_silu_backward_contiguous(const GroupNormSiLUBackward<T>& op, int64_t first_channel,
                                        int64_t end_channel) {
  as_asked(op, [&]<bool kAddUp, Write kWrite>() {
    channels_contiguous<kAddUp, kWrite>(op, first_channel, end_channel);
  });
}

template <class T>
void groupnorm_silu_backward_channels_last(const GroupNormSiLUBackward<T>& op, int64_t first_chunk,
                                           int64_t end_chunk) {
  as_asked(op, [&]<bool kAddUp, Write kWrite>() {
    chunks_channels_last<kAddUp, kWrite>(op, first_chunk, end_chunk);
  });
}

#define K5_INSTANTIATE(T)                                                                                 \
  template void groupnorm_silu_backward_contiguous(const GroupNormSiLUBackward<T>&, int64_t, int64_t);    \
  template void groupnorm_silu_backward_channels_last(const GroupNormSiLUBackward<T>&, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
