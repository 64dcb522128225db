// silu(z) = z / (1 + e^-z) and its gradient, as exact as values of type T need. Everything here is inlined, for the
// reason in isa.h.
#pragma once

#include "vec_math.h"

namespace k5 {
namespace {

constexpr float kLn2 = 0.693147181f, kLog2e = 1.44269504f;

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

// grad * silu'(z); silu' = s * (1 + z * (1 - s)), s the sigmoid. As exact as sums over what belongs to T need.
template <class T, class V>
inline __attribute__((always_inline)) V through_silu(V grad, V scaled) {
  if constexpr (sizeof(T) == sizeof(float)) {
    const V s = 1.0f / (exp(-scaled) + 1.0f);
    return grad * (s * (scaled * (1.0f - s) + 1.0f));
  }
  const V s = 1.0f / (rough_exp2<5>(scaled) + 1.0f);
  return (grad * s) * (scaled * (s * kLn2 - kLn2) + 1.0f);
}

}  // namespace
}  // namespace k5
