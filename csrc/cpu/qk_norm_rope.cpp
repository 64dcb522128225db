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
  SplitRow operator[](int64_t row) const {
    return {floats_.data + 2 * row * half_, floats_.data + (2 * row + 1) * half_};
  }

 private:
  const int64_t half_;
  const ZeroedFloats floats_;
};

// For the sake of Ties::away.
inline Pairs plain(Pairs pairs) { return {with_plain_nan(pairs.even), with_plain_nan(pairs.odd)}; }

template <class T>
inline const T* head_at(const Heads<T>& heads, int64_t batch, int64_t token, int64_t head) {
  return heads.data + batch * heads.batch_stride + token * heads.sequence_stride + head * heads.head_stride;
}

// Room for a float a head, in whole vectors.
inline int64_t whole_heads(int64_t heads) { return (heads + kLanes - 1) / kLanes * kLanes; }

// 1 / rms of every head of a token from its sum of squares.
inline void inverse_rms_of(float* squares, int64_t heads, int64_t width, float eps) {
  for (int64_t head = 0; head < heads; head += kLanes)
    store(squares + head, 1.0f / sqrt(load(squares + head) / static_cast<float>(width) + eps));
}

// All heads of a token are read, then their roots taken, then all are written: one head after the other would wait for
// its sum, its root and its quotient. What is read a second time comes from the first-level cache.
template <bool kPastCaches, class T>
void rows_forward(const NormRope<T>& op, int64_t first_row, int64_t end_row) {
  // With n = x / rms: out.even = n.even * to_even.even + n.odd * to_even.odd, and so on. The weight is multiplied into
  // the factors, which all heads of a token share.
  const SplitRows rows(3, op.width);
  const SplitRow to_even = rows[0], to_odd = rows[1], weights = rows[2];
  const ZeroedFloats inverse_rms(whole_heads(op.heads));
  for_pairs(op.width, [&](int64_t i, auto lanes) { weights.set(i, plain(lanes.template floats<T>(op.weight + i))); });
  for (int64_t row = first_row; row < end_row; row++) {
    const int64_t batch = row / op.sequence, token = row % op.sequence;
    const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
    for_pairs(op.width, [&](int64_t i, auto lanes) {
      const Pairs weight = weights.get(i);
      const auto [c, s] = plain(Pairs{lanes.template half<T>(cos + i / 2), lanes.template half<T>(sin + i / 2)});
      to_even.set(i, Pairs{weight.even * c, -weight.odd * s});
      to_odd.set(i, Pairs{weight.even * s, weight.odd * c});
    });
    const int64_t step = token + 1 < op.sequence && row + 1 < end_row ? op.x.sequence_stride : 0;
    for (int64_t head = 0; head < op.heads; head++) {
      const T* x = head_at(op.x, batch, token, head);
      Vec16 squares = {};
      for_pairs(op.width, [&](int64_t i, auto lanes) {
        const Vec16 value = lanes.any(x + i);
        squares = squares + value * value;
      });
      inverse_rms.data[head] = sum(squares);
    }
    inverse_rms_of(inverse_rms.data, op.heads, op.width, op.eps);
    for (int64_t head = 0; head < op.heads; head++) {
      const T* x = head_at(op.x, batch, token, head);
      T* out = op.out + (row * op.heads + head) * op.width;
      const float inverse = inverse_rms.data[head];
      for_pairs(op.width, [&](int64_t i, auto lanes) {
        __builtin_prefetch(x + step + i);
        const Pairs value = lanes.get(x + i), even = to_even.get(i), odd = to_odd.get(i);
        lanes.template set<kPastCaches, Ties::away>(
            out + i, Pairs{(value.even * even.even + value.odd * even.odd) * inverse,
                           (value.even * odd.even + value.odd * odd.odd) * inverse});
      });
    }
  }
  if (kPastCaches) end_of_stream();
}

// With r the gradient rotated back, n = x / rms, g = r * weight the gradient of n, and means over the head:
// grad_x = (g - n * mean(g * n)) / rms, grad_weight = sum of r * n over all heads.
template <bool kPastCaches, class T>
void pieces_backward(const NormRopeBackward<T>& op, int64_t first_piece, int64_t end_piece) {
  const SplitRows rows(4, op.width), rotated(op.heads, op.width);
  const SplitRow weight = rows[0], trig = rows[1], of_token = rows[2], of_piece = rows[3];
  const ZeroedFloats inverse_rms(whole_heads(op.heads)), dots(whole_heads(op.heads));
  for_pairs(op.width, [&](int64_t i, auto lanes) { weight.set(i, plain(lanes.template floats<T>(op.weight + i))); });
  for (int64_t piece = first_piece; piece < end_piece; piece++) {
    for_pairs(op.width, [&](int64_t i, auto) { of_piece.set(i, Pairs{}); });
    const int64_t all = op.batch * op.sequence, first = piece * kPieceRows;
    for (int64_t row = first; row < first + kPieceRows && row < all; row++) {
      const int64_t batch = row / op.sequence, token = row % op.sequence;
      const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
      for_pairs(op.width, [&](int64_t i, auto lanes) {
        trig.set(i, plain(Pairs{lanes.template half<T>(cos + i / 2), lanes.template half<T>(sin + i / 2)}));
        of_token.set(i, Pairs{});
      });
      const bool last = token + 1 == op.sequence;
      const int64_t step = last ? 0 : op.x.sequence_stride, grad_step = last ? 0 : op.grad.sequence_stride;
      for (int64_t head = 0; head < op.heads; head++) {
        const T *grad = head_at(op.grad, batch, token, head), *x = head_at(op.x, batch, token, head);
        const SplitRow kept = rotated[head];
        Vec8 even_squares = {}, odd_squares = {}, even_dots = {}, odd_dots = {};
        for_pairs(op.width, [&](int64_t i, auto lanes) {
          __builtin_prefetch(x + step + i);
          const Pairs value = lanes.get(x + i), gradient = lanes.get(grad + i), w = weight.get(i), turn = trig.get(i);
          const Vec8 even = gradient.even * turn.even + gradient.odd * turn.odd;
          const Vec8 odd = gradient.odd * turn.even - gradient.even * turn.odd;
          even_squares += value.even * value.even;
          odd_squares += value.odd * value.odd;
          even_dots += even * w.even * value.even;
          odd_dots += odd * w.odd * value.odd;
          kept.set(i, Pairs{even, odd});
        });
        inverse_rms.data[head] = sum(even_squares + odd_squares);
        dots.data[head] = sum(even_dots + odd_dots);
      }
      inverse_rms_of(inverse_rms.data, op.heads, op.width, op.eps);
      for (int64_t head = 0; head < op.heads; head++) {
        const T* x = head_at(op.x, batch, token, head);
        T* grad_x = op.grad_x + (row * op.heads + head) * op.width;
        const SplitRow kept = rotated[head];
        const T* grad = head_at(op.grad, batch, token, head);
        const float inverse = inverse_rms.data[head], projection = dots.data[head] / op.width * inverse * inverse;
        for_pairs(op.width, [&](int64_t i, auto lanes) {
          __builtin_prefetch(grad + grad_step + i);
          const Pairs value = lanes.get(x + i), r = kept.get(i), w = weight.get(i), sums = of_token.get(i);
          lanes.template set<kPastCaches, Ties::away>(
              grad_x + i, Pairs{(r.even * w.even - value.even * projection) * inverse,
                                (r.odd * w.odd - value.odd * projection) * inverse});
          of_token.set(i, Pairs{sums.even + r.even * (value.even * inverse), sums.odd + r.odd * (value.odd * inverse)});
        });
      }
      // Heads first, then tokens: few additions in a row lose few digits.
      for_pairs(op.width, [&](int64_t i, auto) {
        const Pairs sums = of_piece.get(i), more = of_token.get(i);
        of_piece.set(i, Pairs{sums.even + more.even, sums.odd + more.odd});
      });
    }
    for_pairs(op.width, [&](int64_t i, auto lanes) {
      lanes.template set<false>(op.grad_weight + piece * op.width + i, in_pair_order<T>(of_piece.get(i)));
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
