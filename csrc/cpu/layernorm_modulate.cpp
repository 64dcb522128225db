#include "layernorm_modulate.h"

#include <cmath>

namespace k5::K5_ISA {
namespace {

// Two-pass: the mean, then the sum of squared differences from it. The second pass reads the row from the cache, and
// subtracting first loses no digits to cancellation.
template <class T>
inline void statistics(const T* row, int64_t width, float eps, float& mean, float& inverse_deviation) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole;
  Vec8 total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes)
    for (int part = 0; part < 4; part++) total[part] += load(row + i + part * kLanes);
  for (; i < whole; i += kLanes) total[0] += load(row + i);
  if (rest) total[1] += load_partial(row + whole, rest);
  mean = sum((total[0] + total[1]) + (total[2] + total[3])) / width;

  Vec8 square[4] = {};
  for (i = 0; i + 4 * kLanes <= whole; i += 4 * kLanes)
    for (int part = 0; part < 4; part++) {
      const Vec8 difference = load(row + i + part * kLanes) - mean;
      square[part] += difference * difference;
    }
  for (; i < whole; i += kLanes) {
    const Vec8 difference = load(row + i) - mean;
    square[0] += difference * difference;
  }
  if (rest) {
    const Vec8 difference = keep_first(load_partial(row + whole, rest) - mean, rest);
    square[1] += difference * difference;
  }
  inverse_deviation = 1 / std::sqrt(sum((square[0] + square[1]) + (square[2] + square[3])) / width + eps);
}

}  // namespace

template <class T>
void layernorm_modulate(const LayerNormModulate<T>& op, int64_t first_row, int64_t end_row) {
  const int64_t whole = op.width / kLanes * kLanes, rest = op.width - whole;
  Place place = place_of(op.sequences, first_row);
  for (int64_t row = first_row; row < end_row; row++, place = next(op.sequences, place)) {
    const T* x = op.x + row * op.width;
    T* out = op.out + row * op.width;
    const float *shift = row_at(op.shift, place), *scale = row_at(op.scale, place);
    float mean, inverse_deviation;
    statistics(x, op.width, op.eps, mean, inverse_deviation);
    const auto modulated = [&](Vec8 value, Vec8 factor, Vec8 offset) {
      return (value - mean) * inverse_deviation * (factor + 1.0f) + offset;
    };
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, modulated(load(x + i), load(scale + i), load(shift + i)));
    if (rest)
      store_partial(out + whole,
                    modulated(load_partial(x + whole, rest), load_partial(scale + whole, rest),
                              load_partial(shift + whole, rest)),
                    rest);
  }
}

template void layernorm_modulate(const LayerNormModulate<float>&, int64_t, int64_t);
template void layernorm_modulate(const LayerNormModulate<BFloat16>&, int64_t, int64_t);

}  // namespace k5::K5_ISA
