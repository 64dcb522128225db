#include "qk_norm_rope.h"

#include <cmath>

namespace k5::K5_ISA {
namespace {

// An array of zeros. std::vector would not do: every instruction set's build instantiates its functions, and the linker
// keeps one copy for all (csrc/cpu/isa.h).
struct ZeroedFloats {
  explicit ZeroedFloats(int64_t size) : data(new float[size]()) {}
  ~ZeroedFloats() { delete[] data; }
  ZeroedFloats(const ZeroedFloats&) = delete;
  ZeroedFloats& operator=(const ZeroedFloats&) = delete;
  float* const data;
};

template <class T>
inline float inverse_rms(const T* row, int64_t whole, int64_t rest, float eps) {
  Vec8 even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= whole; i += 2 * kLanes) {
    const Vec8 first = load(row + i), second = load(row + i + kLanes);
    even += first * first;
    odd += second * second;
  }
  if (i < whole) {
    const Vec8 value = load(row + i);
    even += value * value;
  }
  if (rest) {
    const Vec8 value = load_partial(row + whole, rest);
    odd += value * value;
  }
  return 1 / std::sqrt(sum(even + odd) / (whole + rest) + eps);
}

}  // namespace

template <class T>
void norm_rope(const NormRope<T>& op, int64_t first_row, int64_t end_row) {
  const int64_t whole = op.width / kLanes * kLanes, rest = op.width - whole;
  // With n = x / rms: out = n * direct + swap_pairs(n) * crossed. The weight is multiplied into both factors, which all
  // heads of a token share.
  const int64_t padded = whole + kLanes;
  const ZeroedFloats factors(2 * padded);
  float *const direct = factors.data, *const crossed = direct + padded;
  for (int64_t row = first_row; row < end_row; row++) {
    const int64_t batch = row / op.sequence, token = row % op.sequence;
    const float *cos = op.cos + token * (op.width / 2), *sin = op.sin + token * (op.width / 2);
    for (int64_t i = 0; i < op.width; i += 2) {
      direct[i] = op.weight[i] * cos[i / 2];
      direct[i + 1] = op.weight[i + 1] * cos[i / 2];
      crossed[i] = -op.weight[i + 1] * sin[i / 2];
      crossed[i + 1] = op.weight[i] * sin[i / 2];
    }
    for (int64_t head = 0; head < op.heads; head++) {
      const T* x = op.x + batch * op.batch_stride + token * op.sequence_stride + head * op.head_stride;
      T* out = op.out + (row * op.heads + head) * op.width;
      const float scale = inverse_rms(x, whole, rest, op.eps);
      const auto rotated = [&](Vec8 value, int64_t i) {
        value *= scale;
        return value * load(direct + i) + swap_pairs(value) * load(crossed + i);
      };
      for (int64_t i = 0; i < whole; i += kLanes) store(out + i, rotated(load(x + i), i));
      if (rest) store_partial(out + whole, rotated(load_partial(x + whole, rest), whole), rest);
    }
  }
}

template void norm_rope(const NormRope<float>&, int64_t, int64_t);
template void norm_rope(const NormRope<BFloat16>&, int64_t, int64_t);

}  // namespace k5::K5_ISA
