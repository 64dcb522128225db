#include "layernorm_modulate.h"

#include <cmath>

#include "lanes.h"

namespace k5::K5_ISA {
namespace {

// Fetches half of the next row while this one is read again from the cache: the memory would idle meanwhile.
template <class T>
inline __attribute__((always_inline)) void prefetch_half(const T* half, int64_t i, int part) {
  if (part == 0) __builtin_prefetch(half + i / 2);
}

template <bool kPastCaches, class T>
void rows_forward(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row) {
  const int64_t width = op.width;
  Place place = place_of(op.sequences, first_row);
  for (int64_t row = first_row; row < end_row; row++, place = next(op.sequences, place)) {
    const T *x = op.x + row * width, *next_x = row + 1 < end_row ? x + width : x;
    T* out = op.out + row * width;
    const float *shift = row_at(op.shift, place), *scale = row_at(op.scale, place);
    // The mean, then the sum of squared differences from it: subtracting first loses no digits to cancellation.
    Vec8 totals[kParts] = {}, squares[kParts] = {};
    for_lanes(width, [&](int64_t i, int part, auto lanes) { totals[part] += lanes.get(x + i); });
    const float mean = sum_of_parts(totals) / width;
    for_lanes(width, [&](int64_t i, int part, auto lanes) {
      prefetch_half(next_x, i, part);
      const Vec8 centred = lanes.keep(lanes.get(x + i) - mean);
      squares[part] += centred * centred;
    });
    const float inverse_deviation = 1 / std::sqrt(sum_of_parts(squares) / width + op.eps);
    for_lanes(width, [&](int64_t i, int part, auto lanes) {
      prefetch_half(next_x + width / 2, i, part);
      const Vec8 normalized = (lanes.get(x + i) - mean) * inverse_deviation;
      lanes.template set<kPastCaches>(out + i, normalized * (lanes.get(scale + i) + 1.0f) + lanes.get(shift + i));
    });
  }
  if (kPastCaches) end_of_stream();
}

// With n the normalized x, g = grad * (1 + scale) the gradient of n, and means over the row:
// grad_x = (g - mean(g) - n * mean(g * n)) / deviation.
template <bool kPastCaches, class T>
void pieces_backward(const LayerNormModulateBackward<T>& op, const Piece* pieces, int64_t first_piece,
                     int64_t end_piece) {
  const int64_t width = op.width;
  for (int64_t number = first_piece; number < end_piece; number++) {
    const Piece& piece = pieces[number];
    Place place = piece.place;
    for (int64_t row = piece.first_row; row < piece.end_row; row++, place = next(op.sequences, place)) {
      const T *grad = op.grad + row * width, *x = op.x + row * width;
      const int64_t step = row + 1 < piece.end_row || number + 1 < end_piece ? width : 0;
      const T *next_grad = grad + step, *next_x = x + step;
      T* grad_x = op.grad_x + row * width;
      const float* scale = row_at(op.scale, place);
      const GradientRow grad_shift = gradient_row(op.grad_shift, piece, number, row, width);
      const GradientRow grad_scale = gradient_row(op.grad_scale, piece, number, row, width);

      // The same rounding each time: where all values of a row are near each other, the deviation magnifies differences.
      const auto scaled = [&](int64_t i, auto lanes) {
        return rounded(lanes.get(grad + i) * (lanes.get(scale + i) + 1.0f));
      };
      Vec8 totals[kParts] = {}, scaled_totals[kParts] = {}, squares[kParts] = {}, products[kParts] = {};
      for_lanes(width, [&](int64_t i, int part, auto lanes) {
        totals[part] += lanes.get(x + i);
        scaled_totals[part] += scaled(i, lanes);
      });
      const float mean = sum_of_parts(totals) / width, scaled_mean = sum_of_parts(scaled_totals) / width;
      for_lanes(width, [&](int64_t i, int part, auto lanes) {
        prefetch_half(next_x, i, part);
        prefetch_half(next_grad, i, part);
        const Vec8 centred = lanes.keep(lanes.get(x + i) - mean);
        squares[part] += centred * centred;
        products[part] += scaled(i, lanes) * centred;
      });
      const float inverse_deviation = 1 / std::sqrt(sum_of_parts(squares) / width + op.eps);
      const float projection = sum_of_parts(products) * inverse_deviation / width;
      for_lanes(width, [&](int64_t i, int part, auto lanes) {
        prefetch_half(next_x + width / 2, i, part);
        prefetch_half(next_grad + width / 2, i, part);
        const Vec8 gradient = lanes.get(grad + i), normalized = (lanes.get(x + i) - mean) * inverse_deviation;
        const Vec8 tangent = scaled(i, lanes) - scaled_mean - normalized * projection;
        lanes.template set<kPastCaches>(grad_x + i, tangent * inverse_deviation);
        grad_shift.add(i, lanes, gradient);
        grad_scale.add(i, lanes, gradient * normalized);
      });
    }
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
