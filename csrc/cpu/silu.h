// silu(z) = z / (1 + e^-z), as exact as values of type T need. Everything here is inlined, for the reason in isa.h.
#pragma once

#include "vec_math.h"

namespace k5 {
namespace {

constexpr float kLog2e = 1.44269504f;

// What z is multiplied by before it comes here. For bfloat16 that makes it the exponent of 2^(-z * log2(e)) = e^-z: the
// factor is folded into what z is computed from, and costs nothing.
template <class T>
constexpr float kScaleOfZ = sizeof(T) == sizeof(float) ? 1 : -kLog2e;

// V: as for `exp` of vec_math.h.
template <class T, class V>
inline __attribute__((always_inline)) V silu(V scaled) {
  if constexpr (sizeof(T) == sizeof(float)) return scaled / (exp(-scaled) + 1.0f);
  return scaled / (rough_exp2<4>(scaled) * -kLog2e - kLog2e);
}

}  // namespace
}  // namespace k5
