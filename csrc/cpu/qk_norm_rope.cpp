#include "qk_norm_rope.h"

#include <cmath>

#include "lanes.h"
#include "prefetch.h"
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

constexpr int64_t kPairedValues = 2 * kLanes;

// Neighbours of a row that are taken together.
template <int kCount_, class Lanes>
struct Blocks {
  static constexpr int kCount = kCount_;
  Lanes lanes;
};

// Calls visit(i, blocks) for every 32 pairs of a row of even width, then for sixteen, for eight and for what is left; i
// is the number of the first value.
template <class Visit>
inline __attribute__((always_inline)) void for_blocks(int64_t width, const Visit& visit) {
  int64_t i = 0;
  for (; i + 4 * kPairedValues <= width; i += 4 * kPairedValues) visit(i, Blocks<4, AllPairs>{});
  for (; i + 2 * kPairedValues <= width; i += 2 * kPairedValues) visit(i, Blocks<2, AllPairs>{});
  for_pairs(width - i, [&](int64_t rest, auto lanes) { visit(i + rest, Blocks<1, decltype(lanes)>{lanes}); });
}

// All heads of a token are read, then their roots taken, then all are written: one head after the other would wait for
// its sum, its root and its quotient. What is read a second time comes from the first-level cache. 32 pairs of every
// head are written before the next 32: what belongs to all heads stays in registers.
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
    for_blocks(op.width, [&](int64_t i, auto blocks) {
      Pairs even[blocks.kCount], odd[blocks.kCount];
      for (int block = 0; block < blocks.kCount; block++) {
        even[block] = to_even.get(i + block * kPairedValues);
        odd[block] = to_odd.get(i + block * kPairedValues);
      }
      for (int64_t head = 0; head < op.heads; head++) {
        const T* x = head_at(op.x, batch, token, head) + i;
        T* out = op.out + (row * op.heads + head) * op.width + i;
        const float inverse = inverse_rms.data[head];
        prefetch_values(x + step, blocks.kCount * kPairedValues);
        for (int block = 0; block < blocks.kCount; block++) {
          const int64_t at = block * kPairedValues;
          const Pairs value = blocks.lanes.get(x + at);
          blocks.lanes.template set<kPastCaches, Ties::away>(
              out + at, Pairs{(value.even * even[block].even + value.odd * even[block].odd) * inverse,
                              (value.even * odd[block].even + value.odd * odd[block].odd) * inverse});
        }
      }
    });
  }
  if (kPastCaches) end_of_stream();
}

// With r the gradient rotated back, n = x / rms, g = r * weight the gradient of n, and means over the head:
// grad_x = (g - n * mean(g * n)) / rms, grad_weight = sum of r * n over all heads.
template <bool kPastCaches, class T>
void pieces_backward(const NormRopeBackward<T>& op, int64_t first_piece, int64_t end_piece) {
  const SplitRows rows(3, op.width), rotated(op.heads, op.width);
  const SplitRow weight = rows[0], trig = rows[1], of_piece = rows[2];
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
      for (int64_t head = 0; head < op.heads; head += kLanes) {
        const Vec8 inverse = load(inverse_rms.data + head);
        const Vec8 mean = load(dots.data + head) / static_cast<float>(op.width);
        store(dots.data + head, mean * inverse * inverse * inverse);  // what x of the head is multiplied by
      }
      for_blocks(op.width, [&](int64_t i, auto blocks) {
        // Heads first, then tokens: few additions in a row lose few digits.
        Pairs w[blocks.kCount], sums[blocks.kCount] = {};
        for (int block = 0; block < blocks.kCount; block++) w[block] = weight.get(i + block * kPairedValues);
        for (int64_t head = 0; head < op.heads; head++) {
          const T *x = head_at(op.x, batch, token, head) + i, *grad = head_at(op.grad, batch, token, head) + i;
          T* grad_x = op.grad_x + (row * op.heads + head) * op.width + i;
          const float inverse = inverse_rms.data[head], projection = dots.data[head];
          prefetch_values(grad + grad_step, blocks.kCount * kPairedValues);
          for (int block = 0; block < blocks.kCount; block++) {
            const int64_t at = block * kPairedValues;
            const Pairs value = blocks.lanes.get(x + at), r = rotated[head].get(i + at);
            const Pairs scaled{r.even * inverse, r.odd * inverse};
            blocks.lanes.template set<kPastCaches, Ties::away>(
                grad_x + at, Pairs{scaled.even * w[block].even - value.even * projection,
                                   scaled.odd * w[block].odd - value.odd * projection});
            sums[block].even += scaled.even * value.even;
            sums[block].odd += scaled.odd * value.odd;
          }
        }
        for (int block = 0; block < blocks.kCount; block++) {
          const Pairs before = of_piece.get(i + block * kPairedValues);
          of_piece.set(i + block * kPairedValues,
                       Pairs{before.even + sums[block].even, before.odd + sums[block].odd});
        }
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
