// Roots, exponentials, logarithms and sums of vectors of any width. Functions are static, for the reason in vec.h.
#pragma once

#include <initializer_list>

#include "wide_vec.h"

namespace k5 {

// Square roots.
static inline Vec8 sqrt(Vec8 value) {
#ifdef __AVX2__
  return (Vec8)_mm256_sqrt_ps((__m256)value);
#else
  for (int64_t lane = 0; lane < kLanes; lane++) value[lane] = __builtin_sqrtf(value[lane]);
  return value;
#endif
}

// The value, at most `limit` and at least -limit. NaN stays NaN.
static inline Vec8 clamped(Vec8 value, float limit) {
#ifdef __AVX2__
  return (Vec8)_mm256_max_ps((__m256)splat(-limit), _mm256_min_ps((__m256)splat(limit), (__m256)value));
#else
  value = value > splat(limit) ? splat(limit) : value;
  return value < splat(-limit) ? splat(-limit) : value;
#endif
}
#ifdef __AVX512F__
static inline Vec16 clamped(Vec16 value, float limit) {
  return (Vec16)_mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), (__m512)value));
}
#endif
template <class V>
static inline Twice<V> clamped(Twice<V> value, float limit) {
  return {clamped(value.first, limit), clamped(value.second, limit)};
}

// Adding it rounds a number to an integer, which then stands in the low bits: 1.5 * 2^23.
constexpr float kMagic = 12582912.0f;

// value * 2^whole, of the whole number to which kMagic was added.
static inline Vec8 scaled_by_power(Vec8 value, Vec8 whole_and_magic) {
  return bits_as<Vec8>(bits_as<UVec8>(value) + (bits_as<UVec8>(whole_and_magic) << 23));
}
#ifdef __AVX512F__
static inline Vec16 scaled_by_power(Vec16 value, Vec16 whole_and_magic) {
  return bits_as<Vec16>(bits_as<UVec16>(value) + (bits_as<UVec16>(whole_and_magic) << 23));
}
#endif
template <class V>
static inline Twice<V> scaled_by_power(Twice<V> value, Twice<V> whole_and_magic) {
  return {scaled_by_power(value.first, whole_and_magic.first), scaled_by_power(value.second, whole_and_magic.second)};
}

// e^value, accurate to about one unit in the last place; values are clamped to ±87. value = whole · ln(2) + rest with
// |rest| <= ln(2) / 2, and e^rest is a polynomial, the one of its degree that is nearest. V: Vec8, Vec16 or
// Vec32, here and below.
template <class V>
static inline __attribute__((always_inline)) V exp(V value) {
  value = clamped(value, 87.0f);
  const V shifted = value * 1.44269504f + kMagic;
  const V whole = shifted - kMagic;
  const V rest = value - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln(2) in two parts, for accuracy
  V polynomial = rest * 1.3836845e-3f + 8.3748158e-3f;
  for (const float coefficient : {4.1668222e-2f, 0.16666420f, 0.49999991f, 1.0f, 1.0f})
    polynomial = polynomial * rest + coefficient;
  return scaled_by_power(polynomial, shifted);
}

#ifdef __AVX512F__
// value - floor(value), and value * 2^floor(exponent), for any numbers.
static inline Vec16 above_floor(Vec16 value) {
  return (Vec16)_mm512_reduce_ps((__m512)value, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
static inline Vec16 scaled_by_floor(Vec16 value, Vec16 exponent) {
  return (Vec16)_mm512_scalef_ps((__m512)value, (__m512)exponent);
}
template <class V>
static inline Twice<V> above_floor(Twice<V> value) {
  return {above_floor(value.first), above_floor(value.second)};
}
template <class V>
static inline Twice<V> scaled_by_floor(Twice<V> value, Twice<V> exponent) {
  return {scaled_by_floor(value.first, exponent.first), scaled_by_floor(value.second, exponent.second)};
}

// 2^value for what belongs to values in bfloat16. Degree 5: to a relative error of 1e-7. Degree 4: to 3e-6, a
// thousandth of a rounding to bfloat16.
template <int kDegree, class V>
static inline __attribute__((always_inline)) V rough_exp2(V value) {
  static_assert(kDegree == 4 || kDegree == 5);
  const V rest = above_floor(value);
  V polynomial;
  if constexpr (kDegree == 5) {
    polynomial = rest * 1.8775767e-3f + 8.9893400e-3f;
    for (const float coefficient : {5.5826318e-2f, 0.24015362f, 0.69315307f, 0.99999993f})
      polynomial = polynomial * rest + coefficient;
  } else {
    polynomial = rest * 1.3534168e-2f + 5.2011460e-2f;
    for (const float coefficient : {0.24144276f, 0.69300383f, 1.0000026f})
      polynomial = polynomial * rest + coefficient;
  }
  return scaled_by_floor(polynomial, value);
}
#else
// 2^value for what belongs to values in bfloat16; values are clamped to ±126. Degree 5: to a relative error of 1e-7.
// Degree 4: to 3e-6, a thousandth of a rounding to bfloat16.
template <int kDegree, class V>
static inline __attribute__((always_inline)) V rough_exp2(V value) {
  static_assert(kDegree == 4 || kDegree == 5);
  value = clamped(value, 126.0f);
  const V shifted = value + kMagic;
  const V rest = value - (shifted - kMagic);
  if constexpr (kDegree == 5) {
    V polynomial = rest * 1.3276470e-3f + 9.6755410e-3f;
    for (const float coefficient : {5.5507131e-2f, 0.24022120f, 0.69314694f, 1.0000001f})
      polynomial = polynomial * rest + coefficient;
    return scaled_by_power(polynomial, shifted);
  } else {
    V polynomial = rest * 9.5701013e-3f + 5.5917863e-2f;
    for (const float coefficient : {0.24024744f, 0.69312179f, 0.99999928f})
      polynomial = polynomial * rest + coefficient;
    return scaled_by_power(polynomial, shifted);
  }
}
#endif

// log2(value) for positive normal numbers, accurate to about two units in the last place; NaN for NaN. value =
// 2^exponent · m with m in [sqrt(1/2), sqrt(2)); log2(m) is the series of 2 / ln(2) · artanh((m - 1) / (m + 1)).
static inline Vec8 log2(Vec8 value) {
  const UVec8 bits = bits_as<UVec8>(value);
  const UVec8 exponent = ((bits - 0x3f3504f3u + 0x3f800000u) >> 23) - 127u;
  const Vec8 m = bits_as<Vec8>(bits - (exponent << 23));
  const Vec8 ratio = (m - 1.0f) / (m + 1.0f), square = ratio * ratio;
  Vec8 series = splat(2.88539008f / 9);
  for (const float coefficient : {2.88539008f / 7, 2.88539008f / 5, 2.88539008f / 3, 2.88539008f})
    series = series * square + coefficient;
  return __builtin_convertvector(bits_as<IVec8>(exponent), Vec8) + series * ratio + (value - value);
}

static inline float sum(Vec8 value) {
  Vec4 halves[2];
  std::memcpy(halves, &value, sizeof(value));
  const Vec4 four = halves[0] + halves[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}
#ifdef __AVX512F__
static inline float sum(Vec16 value) {
  return sum((Vec8)_mm512_castps512_ps256((__m512)value) + (Vec8)_mm512_extractf32x8_ps((__m512)value, 1));
}
#endif
template <class V>
static inline float sum(Twice<V> value) {
  return sum(value.first + value.second);
}

}  // namespace k5
