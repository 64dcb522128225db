#include "layernorm_modulate.h"

#include <cmath>

#include "lanes.h"
#include "pivot.h"
#include "prefetch.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// Fetches half of the next row while this one is read again from the cache: the memory would idle meanwhile.
template <class T>
inline __attribute__((always_inline)) void prefetch_half(const T* half, int64_t i, int part) {
  if (part == 0) __builtin_prefetch(half + i / 2);
}

// The row of a modulation that belongs to a token, in the order of a row of T; one more than it where asked. NaNs are
// plain for the sake of Ties::away. Tokens of one clip share it: it is arranged when it changes.
template <class T>
class ArrangedRow {
 public:
  ArrangedRow(int64_t width, float added) : width_(width), added_(added), values_(whole_sixteens(width)) {}
  const float* of(const float* row) {
    if (row != row_) {
      arrange<T>(values_.data, row, width_);
      for (int64_t i = 0; i < whole_sixteens(width_); i++) values_.data[i] = with_plain_nan(values_.data[i] + added_);
      row_ = row;
    }
    return values_.data;
  }

 private:
  const int64_t width_;
  const float added_;
  const ZeroedFloats values_;
  const float* row_ = nullptr;
};

template <bool kPastCaches, class T>
void rows_forward(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row) {
  const int64_t width = op.width;
  ArrangedRow<T> shifts(width, 0), scales(width, 1);
  Place place = place_of(op.sequences, first_row);
  for (int64_t row = first_row; row < end_row; row++, place = next(op.sequences, place)) {
    const T *x = op.x + row * width, *next_x = row + 1 < end_row ? x + width : x;
    T* out = op.out + row * width;
    const float *shift = shifts.of(row_at(op.shift, place)), *scale = scales.of(row_at(op.scale, place));
    // The mean, then the sum of squared differences from it: subtracting first loses no digits to cancellation.
    Vec16 totals[kSums] = {}, squares[kSums] = {};
    for_sixteens(width, [&](int64_t i, int part, auto lanes) {
      totals[part] = totals[part] + lanes.get(x + i);
    });
    const float mean = sum_of_parts(totals) / width;
    for_sixteens(width, [&](int64_t i, int part, auto lanes) {
      prefetch_half(next_x, i, part);
      const Vec16 centred = lanes.template keep<T>(lanes.get(x + i) - mean);
      squares[part] = squares[part] + centred * centred;
    });
    const float inverse_deviation = 1 / std::sqrt(sum_of_parts(squares) / width + op.eps);
    for_thirty_twos(width, [&](int64_t i, auto lanes) {
      prefetch_half(next_x + width / 2, i, 0);
      prefetch_translation(x + i, 32 * sizeof(T));
      if constexpr (kPastCaches) prefetch_translation(out + i, 32 * sizeof(T));
      const auto normalized = (lanes.get(x + i) - mean) * inverse_deviation;
      lanes.template set<kPastCaches>(out + i, normalized * lanes.arranged(scale + i) + lanes.arranged(shift + i));
    });
  }
  if (kPastCaches) end_of_stream();
}

// The gradient of a modulation: sums over the tokens of a piece, kept in the order of a row of T until the piece ends;
// or a row for each token.
template <class T>
class ModulationSums {
 public:
  ModulationSums(const ModulationGradient& gradient, int64_t width)
      : gradient_(gradient), width_(width), sums_(whole_sixteens(width)) {}

  template <class Lanes, class V>
  __attribute__((always_inline)) void add(int64_t row, int64_t i, Lanes lanes, V value) const {
    if (gradient_.per_token) {
      lanes.template set_floats<T>(gradient_.rows + row * width_ + i, value);
    } else {
      lanes.set_arranged(sums_.data + i, lanes.arranged(sums_.data + i) + value);
    }
  }

  void end_piece(int64_t piece) const {
    if (gradient_.per_token) return;
    for_sixteens(width_, [&](int64_t i, int, auto lanes) {
      lanes.template set_floats<T>(gradient_.rows + piece * width_ + i, load_sixteen(sums_.data + i));
      store_sixteen(sums_.data + i, Vec16{});
    });
  }

 private:
  const ModulationGradient gradient_;
  const int64_t width_;
  const ZeroedFloats sums_;
};

// The mean of a row of T and 1 / its deviation; of p = grad * (1 + scale) the mean, and the mean of its product with
// the normalized x.
struct RowMoments {
  float mean, inverse_deviation, scaled_mean, projection;
};

// grad * (1 + scale), rounded: where all values of a row are near each other, the deviation magnifies differences of
// rounding.
template <class T, class Lanes>
inline __attribute__((always_inline)) auto scaled_gradient(const T* grad, const float* scale, int64_t i, Lanes lanes) {
  return rounded(lanes.get(grad + i) * lanes.arranged(scale + i));
}

// In one pass, of differences from a pivot. Calls meanwhile(i, part) of for_sixteens.
template <class T, class Meanwhile>
inline __attribute__((always_inline)) RowMoments moments_of_row(const T* grad, const T* x, const float* scale,
                                                                int64_t width, float eps, const Meanwhile& meanwhile) {
  const float pivot = pivot_of(x, width, load_one(x));
  Vec16 total{}, square{}, scaled_total{}, product{};
  for_sixteens(width, [&](int64_t i, int part, auto lanes) {
    meanwhile(i, part);
    const Vec16 difference = lanes.template keep<T>(lanes.get(x + i) - pivot);
    const Vec16 scaled = scaled_gradient(grad, scale, i, lanes);
    total = total + difference;
    square = square + difference * difference;
    scaled_total = scaled_total + scaled;
    product = product + scaled * difference;
  });
  const float offset = sum(total) / width, scaled_mean = sum(scaled_total) / width;
  const float variance = sum(square) / width - offset * offset;
  // Rounding may leave less than nothing; a NaN stays one.
  const float inverse_deviation = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
  return {pivot + offset, inverse_deviation, scaled_mean,
          (sum(product) / width - offset * scaled_mean) * inverse_deviation};
}

// With n the normalized x, g = grad * (1 + scale) the gradient of n, and means over the row:
// grad_x = (g - mean(g) - n * mean(g * n)) / deviation.
template <bool kPastCaches, class T>
void pieces_backward(const LayerNormModulateBackward<T>& op, const Piece* pieces, int64_t first_piece,
                     int64_t end_piece) {
  const int64_t width = op.width;
  if (width == 0) return;  // a row has no first value
  ArrangedRow<T> scales(width, 1);
  const ModulationSums<T> grad_shift(op.grad_shift, width), grad_scale(op.grad_scale, width);
  for (int64_t number = first_piece; number < end_piece; number++) {
    const Piece& piece = pieces[number];
    Place place = piece.place;
    for (int64_t row = piece.first_row; row < piece.end_row; row++, place = next(op.sequences, place)) {
      const T *grad = op.grad + row * width, *x = op.x + row * width;
      const int64_t step = row + 1 < piece.end_row || number + 1 < end_piece ? width : 0;
      const T *next_grad = grad + step, *next_x = x + step;
      T* grad_x = op.grad_x + row * width;
      const float* scale = scales.of(row_at(op.scale, place));
      const RowMoments row_of = moments_of_row(grad, x, scale, width, op.eps, [&](int64_t i, int part) {
        prefetch_half(next_x, i, part);
        prefetch_half(next_grad, i, part);
      });
      for_lines(width, [&](int64_t i, int part, auto lanes) {
        prefetch_half(next_x + width / 2, i, part);
        prefetch_half(next_grad + width / 2, i, part);
        const auto gradient = lanes.get(grad + i);
        const auto normalized = (lanes.get(x + i) - row_of.mean) * row_of.inverse_deviation;
        const auto scaled = scaled_gradient(grad, scale, i, lanes);
        const auto tangent = scaled - row_of.scaled_mean - normalized * row_of.projection;
        lanes.template set<kPastCaches, Ties::away>(grad_x + i, tangent * row_of.inverse_deviation);
        grad_shift.add(row, i, lanes, gradient);
        grad_scale.add(row, i, lanes, gradient * normalized);
      });
    }
    grad_shift.end_piece(number);
    grad_scale.end_piece(number);
  }
  if (kPastCaches) end_of_stream();
}

}  // namespace

template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row) {
  op.past_caches ? rows_forward<true>(op, first_row, end_row) : rows_forward<false>(op, first_row, end_row);
}

template <class T>
void layernorm_modulate_backward(const LayerNormModulateBackward<T>& op, const Piece* pieces, int64_t first_piece,
                                 int64_t end_piece) {
  op.past_caches ? pieces_backward<true>(op, pieces, first_piece, end_piece)
                 : pieces_backward<false>(op, pieces, first_piece, end_piece);
}

#define K5_INSTANTIATE(T)                                                       \
  template void layernorm_modulate(const LayerNormModulate<T>&, int64_t, int64_t); \
  template void layernorm_modulate_backward(const LayerNormModulateBackward<T>&, const Piece*, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
