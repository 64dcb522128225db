#include "qk_norm_rope.h"

#include <cmath>

#include "lanes.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// Values of a row of pairs, the even ones apart from the odd ones, with room for whole vectors.
struct SplitRow {
  float *even, *odd;

  Pairs get(int64_t i) const { return Pairs{load(even + i / 2), load(odd + i / 2)}; }
  void set(int64_t i, Pairs pairs) const {
    store(even + i / 2, pairs.even);
    store(odd + i / 2, pairs.odd);
  }
};

// Split rows of one width.
class SplitRows {
 public:
  SplitRows(int64_t rows, int64_t width) : half_(width / 2 + kLanes), floats_(rows * 2 * half_) {}
  SplitRow operator[](int64_t row) const { return {floats_.data + 2 * row * half_, floats_.data + (2 * row + 1) * half_}; }

 private:
  const int64_t half_;
  const ZeroedFloats floats_;
};

template <class T>
inline const T* head_at(const Heads<T>& heads, int64_t batch, int64_t token, int64_t head) {
  return heads.data + batch * heads.batch_stride + token * heads.sequence_stride + head * heads.head_stride;
}

template <bool kPastCaches, class T>
void rows_forward(const NormRope<T>& op, int64_t first_row, int64_t end_row) {
  // With n = x / rms: out.even = n.even * to_even.even + n.odd * to_even.odd, and so on. The weight is multiplied into
  // the factors, which all heads of a token share.
  const SplitRows rows(2, op.width);
  const SplitRow to_even = rows[0], to_odd = rows[1];
  for (int64_t row = first_row; row < end_row; row++) {
    const int64_t batch = row / op.sequence, token = row % op.sequence;
    const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
    for_pairs(op.width, [&](int64_t i, auto lanes) {
      const Pairs weight = lanes.get(op.weight + i);
      const Vec8 c = lanes.half(cos + i / 2), s = lanes.half(sin + i / 2);
      to_even.set(i, Pairs{weight.even * c, -weight.odd * s});
      to_odd.set(i, Pairs{weight.even * s, weight.odd * c});
    });
    for (int64_t head = 0; head < op.heads; head++) {
      const T* x = head_at(op.x, batch, token, head);
      T* out = op.out + (row * op.heads + head) * op.width;
      Vec8 even_squares = {}, odd_squares = {};
      for_pairs(op.width, [&](int64_t i, auto lanes) {
        const Pairs value = lanes.get(x + i);
        even_squares += value.even * value.even;
        odd_squares += value.odd * value.odd;
      });
      const float inverse_rms = 1 / std::sqrt(sum(even_squares + odd_squares) / op.width + op.eps);
      for_pairs(op.width, [&](int64_t i, auto lanes) {
        const Pairs value = lanes.get(x + i), even = to_even.get(i), odd = to_odd.get(i);
        const Vec8 n_even = value.even * inverse_rms, n_odd = value.odd * inverse_rms;
        lanes.template set<kPastCaches>(
            out + i, Pairs{n_even * even.even + n_odd * even.odd, n_even * odd.even + n_odd * odd.odd});
      });
    }
  }
  if (kPastCaches) end_of_stream();
}

// With r the gradient rotated back, n = x / rms, g = r * weight the gradient of n, and means over the head:
// grad_x = (g - n * mean(g * n)) / rms, grad_weight = sum of r * n over all heads.
template <bool kPastCaches, class T>
void pieces_backward(const NormRopeBackward<T>& op, int64_t first_piece, int64_t end_piece) {
  const SplitRows rows(5, op.width);
  const SplitRow weight = rows[0], scaled = rows[1], products = rows[2], of_token = rows[3], of_piece = rows[4];
  for_pairs(op.width, [&](int64_t i, auto lanes) { weight.set(i, lanes.get(op.weight + i)); });
  for (int64_t piece = first_piece; piece < end_piece; piece++) {
    for_pairs(op.width, [&](int64_t i, auto) { of_piece.set(i, Pairs{}); });
    const int64_t all = op.batch * op.sequence, first = piece * kPieceRows;
    for (int64_t row = first; row < first + kPieceRows && row < all; row++) {
      const int64_t batch = row / op.sequence, token = row % op.sequence;
      const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
      for_pairs(op.width, [&](int64_t i, auto) { of_token.set(i, Pairs{}); });
      for (int64_t head = 0; head < op.heads; head++) {
        const T *grad = head_at(op.grad, batch, token, head), *x = head_at(op.x, batch, token, head);
        T* grad_x = op.grad_x + (row * op.heads + head) * op.width;
        Vec8 even_squares = {}, odd_squares = {}, even_dots = {}, odd_dots = {};
        for_pairs(op.width, [&](int64_t i, auto lanes) {
          const Pairs value = lanes.get(x + i), gradient = lanes.get(grad + i), w = weight.get(i);
          const Vec8 c = lanes.half(cos + i / 2), s = lanes.half(sin + i / 2);
          const Vec8 even = gradient.even * c + gradient.odd * s, odd = gradient.odd * c - gradient.even * s;
          const Pairs g = {even * w.even, odd * w.odd};
          even_squares += value.even * value.even;
          odd_squares += value.odd * value.odd;
          even_dots += g.even * value.even;
          odd_dots += g.odd * value.odd;
          scaled.set(i, g);
          products.set(i, Pairs{even * value.even, odd * value.odd});
        });
        const float inverse_rms = 1 / std::sqrt(sum(even_squares + odd_squares) / op.width + op.eps);
        const float projection = sum(even_dots + odd_dots) / op.width * inverse_rms * inverse_rms;
        for_pairs(op.width, [&](int64_t i, auto lanes) {
          const Pairs value = lanes.get(x + i), g = scaled.get(i), product = products.get(i), sums = of_token.get(i);
          lanes.template set<kPastCaches>(grad_x + i, Pairs{(g.even - value.even * projection) * inverse_rms,
                                                            (g.odd - value.odd * projection) * inverse_rms});
          of_token.set(i, Pairs{sums.even + product.even * inverse_rms, sums.odd + product.odd * inverse_rms});
        });
      }
      // Heads first, then tokens: few additions in a row lose few digits.
      for_pairs(op.width, [&](int64_t i, auto) {
        const Pairs sums = of_piece.get(i), more = of_token.get(i);
        of_piece.set(i, Pairs{sums.even + more.even, sums.odd + more.odd});
      });
    }
    for_pairs(op.width, [&](int64_t i, auto lanes) {
      lanes.template set<false>(op.grad_weight + piece * op.width + i, of_piece.get(i));
    });
  }
  if (kPastCaches) end_of_stream();
}

}  // namespace

template <class T>
void norm_rope(const NormRope<T>& op, int64_t first_row, int64_t end_row) {
  op.past_caches ? rows_forward<true>(op, first_row, end_row) : rows_forward<false>(op, first_row, end_row);
}

template <class T>
void norm_rope_backward(const NormRopeBackward<T>& op, int64_t first_piece, int64_t end_piece) {
  op.past_caches ? pieces_backward<true>(op, first_piece, end_piece)
                 : pieces_backward<false>(op, first_piece, end_piece);
}

#define K5_INSTANTIATE(T)                                       \
  template void norm_rope(const NormRope<T>&, int64_t, int64_t); \
  template void norm_rope_backward(const NormRopeBackward<T>&, int64_t, int64_t);

K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)

}  // namespace k5::K5_ISA
