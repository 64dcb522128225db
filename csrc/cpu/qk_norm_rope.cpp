#include "qk_norm_rope.h"

#include <cstring>

#include "lanes.h"
#include "prefetch.h"
#include "scratch.h"

namespace k5::K5_ISA {
namespace {

// Values of a row of pairs, the even ones apart from the odd ones, with room for whole vectors. V: of the lanes that
// get and set them.
struct SplitRow {
  float *even, *odd;

  template <class V>
  Twice<V> get(int64_t i) const {
    Twice<V> pairs;
    std::memcpy(&pairs.first, even + i / 2, sizeof(V));
    std::memcpy(&pairs.second, odd + i / 2, sizeof(V));
    return pairs;
  }
  template <class V>
  void set(int64_t i, Twice<V> pairs) const {
    std::memcpy(even + i / 2, &pairs.first, sizeof(V));
    std::memcpy(odd + i / 2, &pairs.second, sizeof(V));
  }
};

// Split rows of one width.
class SplitRows {
 public:
  SplitRows(int64_t rows, int64_t width) : half_(width / 2 + 2 * kLanes), floats_(rows * 2 * half_) {}
  SplitRow operator[](int64_t row) const {
    return {floats_.data + 2 * row * half_, floats_.data + (2 * row + 1) * half_};
  }

 private:
  const int64_t half_;
  const ZeroedFloats floats_;
};

// For the sake of Ties::away.
template <class V>
inline Twice<V> plain(Twice<V> pairs) {
  return {with_plain_nan(pairs.first), with_plain_nan(pairs.second)};
}

template <class T>
inline const T* head_at(const Heads<T>& heads, int64_t batch, int64_t token, int64_t head) {
  return heads.data + batch * heads.batch_stride + token * heads.sequence_stride + head * heads.head_stride;
}

// 1 / rms of heads from their sums of squares.
inline Vec8 inverse_rms_of(Vec8 squares, int64_t width, float eps) {
  return 1.0f / sqrt(squares / static_cast<float>(width) + eps);
}

// Neighbours of a row that are taken together.
template <int kCount_, class Lanes>
struct Blocks {
  static constexpr int kCount = kCount_;
  static constexpr int64_t kStep = Lanes::kWidth, kWidth = kCount * kStep;
  using V = typename Lanes::V;
  Lanes lanes;
};

// The values of a split row at neighbours that are taken together.
template <class Blocks>
struct Held {
  using V = typename Blocks::V;
  Twice<V> values[Blocks::kCount];

  Held(const SplitRow& row, int64_t i, Blocks) {
    for (int block = 0; block < Blocks::kCount; block++) values[block] = row.get<V>(i + block * Blocks::kStep);
  }
  const Twice<V>& operator[](int block) const { return values[block]; }
};

// Calls visit(i, blocks) for every 32 pairs of a row of T of even width, then for what is left; i is the number of the
// first value.
template <class T, class Visit>
inline __attribute__((always_inline)) void for_blocks(int64_t width, const Visit& visit) {
  using Most = MostPairs<T>;
  constexpr int64_t kTogether = 64;
  int64_t i = 0;
  for (; i + kTogether <= width; i += kTogether) visit(i, Blocks<kTogether / Most::kWidth, Most>{});
  for_pairs<T>(width - i, [&](int64_t rest, auto lanes) { visit(i + rest, Blocks<1, decltype(lanes)>{lanes}); });
}

// Room for a float a head, in whole vectors.
class OfHeads {
 public:
  explicit OfHeads(int64_t heads) : floats_((heads + kLanes - 1) / kLanes * kLanes) {}
  float& operator[](int64_t head) const { return floats_.data[head]; }
  Vec8 get(int64_t head) const { return load(floats_.data + head); }
  void set(int64_t head, Vec8 values) const { store(floats_.data + head, values); }

 private:
  const ZeroedFloats floats_;
};

// All heads of a token are read, then their roots taken, then all are written: one head after the other would wait for
// its sum, its root and its quotient. What is read a second time comes from the first-level cache. 32 pairs of every
// head are written before the next 32: what belongs to all heads stays in registers.
template <bool kPastCaches, class T>
void rows_forward(const NormRope<T>& op, int64_t first_row, int64_t end_row) {
  // With n = x / rms: out.even = n.even * to_even.even + n.odd * to_even.odd, and so on. The weight is multiplied into
  // the factors, which all heads of a token share.
  const SplitRows rows(3, op.width);
  const SplitRow to_even = rows[0], to_odd = rows[1], weights = rows[2];
  const OfHeads squares(op.heads), inverse_rms(op.heads);
  for_pairs<T>(op.width, [&](int64_t i, auto lanes) {
    weights.set(i, plain(lanes.template floats<T>(op.weight + i)));
  });
  for (int64_t row = first_row; row < end_row; row++) {
    const int64_t batch = row / op.sequence, token = row % op.sequence;
    const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
    for_pairs<T>(op.width, [&](int64_t i, auto lanes) {
      using V = typename decltype(lanes)::V;
      const Twice<V> weight = weights.get<V>(i);
      const auto [c, s] = plain(Twice<V>{lanes.template half<T>(cos + i / 2), lanes.template half<T>(sin + i / 2)});
      to_even.set(i, Twice<V>{weight.first * c, -weight.second * s});
      to_odd.set(i, Twice<V>{weight.first * s, weight.second * c});
    });
    const int64_t step = token + 1 < op.sequence && row + 1 < end_row ? op.x.sequence_stride : 0;
    for_blocks<T>(op.width, [&](int64_t i, auto blocks) {
      for (int64_t head = 0; head < op.heads; head++) {
        const T* x = head_at(op.x, batch, token, head) + i;
        Twice<typename decltype(blocks)::V> total{};
        for (int block = 0; block < blocks.kCount; block++) {
          const auto value = blocks.lanes.any(x + block * blocks.kStep);
          total = total + value * value;
        }
        squares[head] += sum(total);
      }
    });
    for (int64_t head = 0; head < op.heads; head += kLanes) {
      inverse_rms.set(head, inverse_rms_of(squares.get(head), op.width, op.eps));
      squares.set(head, Vec8{});
    }
    for_blocks<T>(op.width, [&](int64_t i, auto blocks) {
      using V = typename decltype(blocks)::V;
      const Held even(to_even, i, blocks), odd(to_odd, i, blocks);
      for (int64_t head = 0; head < op.heads; head++) {
        const T* x = head_at(op.x, batch, token, head) + i;
        T* out = op.out + (row * op.heads + head) * op.width + i;
        const float inverse = inverse_rms[head];
        prefetch_values(x + step, blocks.kWidth);
        for (int block = 0; block < blocks.kCount; block++) {
          const Twice<V> value = blocks.lanes.get(x + block * blocks.kStep);
          const Twice<V> turned{value.first * even[block].first + value.second * even[block].second,
                                value.first * odd[block].first + value.second * odd[block].second};
          blocks.lanes.template set<kPastCaches, Ties::away>(out + block * blocks.kStep, turned * inverse);
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
  const OfHeads squares(op.heads), products(op.heads), inverse_rms(op.heads), projections(op.heads);
  for_pairs<T>(op.width, [&](int64_t i, auto lanes) { weight.set(i, plain(lanes.template floats<T>(op.weight + i))); });
  for (int64_t piece = first_piece; piece < end_piece; piece++) {
    for_pairs<T>(op.width, [&](int64_t i, auto lanes) {
      of_piece.set(i, Twice<typename decltype(lanes)::V>{});
    });
    const int64_t all = op.batch * op.sequence, first = piece * kPieceRows;
    for (int64_t row = first; row < first + kPieceRows && row < all; row++) {
      const int64_t batch = row / op.sequence, token = row % op.sequence;
      const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
      for_pairs<T>(op.width, [&](int64_t i, auto lanes) {
        trig.set(i, plain(Twice{lanes.template half<T>(cos + i / 2), lanes.template half<T>(sin + i / 2)}));
      });
      const bool last = token + 1 == op.sequence;
      const int64_t step = last ? 0 : op.x.sequence_stride, grad_step = last ? 0 : op.grad.sequence_stride;
      for_blocks<T>(op.width, [&](int64_t i, auto blocks) {
        using V = typename decltype(blocks)::V;
        const Held w(weight, i, blocks), turn(trig, i, blocks);
        for (int64_t head = 0; head < op.heads; head++) {
          const T *x = head_at(op.x, batch, token, head) + i, *grad = head_at(op.grad, batch, token, head) + i;
          prefetch_values(x + step, blocks.kWidth);
          Twice<V> total{}, product{};
          for (int block = 0; block < blocks.kCount; block++) {
            const int64_t at = block * blocks.kStep;
            const Twice<V> value = blocks.lanes.get(x + at), gradient = blocks.lanes.get(grad + at);
            const Twice<V> r{gradient.first * turn[block].first + gradient.second * turn[block].second,
                             gradient.second * turn[block].first - gradient.first * turn[block].second};
            total = total + value * value;
            product = product + r * w[block] * value;
            rotated[head].set(i + at, r);
          }
          squares[head] += sum(total);
          products[head] += sum(product);
        }
      });
      // What x of a head is multiplied by.
      for (int64_t head = 0; head < op.heads; head += kLanes) {
        const Vec8 inverse = inverse_rms_of(squares.get(head), op.width, op.eps);
        const Vec8 mean = products.get(head) / static_cast<float>(op.width);
        inverse_rms.set(head, inverse);
        projections.set(head, mean * inverse * inverse * inverse);
        squares.set(head, Vec8{});
        products.set(head, Vec8{});
      }
      for_blocks<T>(op.width, [&](int64_t i, auto blocks) {
        // Heads first, then tokens: few additions in a row lose few digits.
        using V = typename decltype(blocks)::V;
        const Held w(weight, i, blocks);
        Twice<V> sums[blocks.kCount] = {};
        for (int64_t head = 0; head < op.heads; head++) {
          const T *x = head_at(op.x, batch, token, head) + i, *grad = head_at(op.grad, batch, token, head) + i;
          T* grad_x = op.grad_x + (row * op.heads + head) * op.width + i;
          const float inverse = inverse_rms[head], projection = projections[head];
          prefetch_values(grad + grad_step, blocks.kWidth);
          for (int block = 0; block < blocks.kCount; block++) {
            const int64_t at = block * blocks.kStep;
            const Twice<V> value = blocks.lanes.get(x + at), scaled = rotated[head].get<V>(i + at) * inverse;
            blocks.lanes.template set<kPastCaches, Ties::away>(grad_x + at, scaled * w[block] - value * projection);
            sums[block] = sums[block] + scaled * value;
          }
        }
        for (int block = 0; block < blocks.kCount; block++) {
          const int64_t at = i + block * blocks.kStep;
          of_piece.set(at, of_piece.get<V>(at) + sums[block]);
        }
      });
    }
    for_pairs<T>(op.width, [&](int64_t i, auto lanes) {
      lanes.template set_floats<T>(op.grad_weight + piece * op.width + i,
                                   of_piece.get<typename decltype(lanes)::V>(i));
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
