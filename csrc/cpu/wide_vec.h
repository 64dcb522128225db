// Sixteen and thirty-two floats at a time. Functions are static, for the reason in vec.h.
#pragma once

#include "vec.h"

namespace k5 {

// Two vectors that take each step of a computation together.
template <class V>
struct Twice {
  V first, second;
};

// Sixteen values of a row, in the order that costs their type least: floats as in memory, of bfloat16 those of even
// places first, and with AVX-512 as in memory too. `in_order_of<T>` brings floats that belong to a row of T into its
// order, `from_order_of<T>` undoes that.
#ifdef __AVX512F__
typedef float Vec16 __attribute__((vector_size(64)));
typedef uint32_t UVec16 __attribute__((vector_size(64)));

static inline Vec16 rounded(Vec16 product) {
  asm("" : "+v"(product));
  return product;
}
#else
using Vec16 = Twice<Vec8>;
#endif

// Two Vec16 that follow each other.
using Vec32 = Twice<Vec16>;

// The length of a row of `width` values, rounded up to whole ones.
static inline int64_t whole_sixteens(int64_t width) { return (width + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

// A constant is loaded once for both halves.
template <class V>
static inline Twice<V> operator+(Twice<V> a, Twice<V> b) {
  return {a.first + b.first, a.second + b.second};
}
template <class V>
static inline Twice<V> operator-(Twice<V> a, Twice<V> b) {
  return {a.first - b.first, a.second - b.second};
}
template <class V>
static inline Twice<V> operator*(Twice<V> a, Twice<V> b) {
  return {a.first * b.first, a.second * b.second};
}
template <class V>
static inline Twice<V> operator/(Twice<V> a, Twice<V> b) {
  return {a.first / b.first, a.second / b.second};
}
template <class V>
static inline Twice<V> operator+(Twice<V> a, float b) {
  return {a.first + b, a.second + b};
}
template <class V>
static inline Twice<V> operator-(Twice<V> a, float b) {
  return {a.first - b, a.second - b};
}
template <class V>
static inline Twice<V> operator*(Twice<V> a, float b) {
  return {a.first * b, a.second * b};
}
template <class V>
static inline Twice<V> operator-(float a, Twice<V> b) {
  return {a - b.first, a - b.second};
}
template <class V>
static inline Twice<V> operator/(float a, Twice<V> b) {
  return {a / b.first, a / b.second};
}
template <class V>
static inline Twice<V> operator-(Twice<V> a) {
  return {-a.first, -a.second};
}
template <class V>
static inline Twice<V> rounded(Twice<V> product) {
  return {rounded(product.first), rounded(product.second)};
}

#ifdef __AVX512F__
static inline Vec16 load_sixteen(const float* source) {
  Vec16 values;
  std::memcpy(&values, source, sizeof(values));
  return values;
}
static inline Vec16 load_sixteen(const BFloat16* source) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return (Vec16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

// As of eight values above.
template <Ties kTies>
static inline UVec16 round_to_upper_halves(Vec16 values) {
  const UVec16 bits = bits_as<UVec16>(values);
  if constexpr (kTies == Ties::away) return bits + 0x8000u;
  return values == values ? bits + 0x7fffu + ((bits >> 16) & 1u) : UVec16{} + 0x7fc00000u;
}

template <Ties kTies>
static inline __m256i rounded_to_bfloat16(Vec16 values) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)round_to_upper_halves<kTies>(values), 16));
}

static inline bool any_denormal(Vec32 values) {
  constexpr int kDenormal = 0x20;
  const __mmask16 first = _mm512_fpclass_ps_mask((__m512)values.first, kDenormal);
  return (first | _mm512_fpclass_ps_mask((__m512)values.second, kDenormal)) != 0;
}

// The processor's conversion, which rounds ties to even, takes denormal numbers for zeros.
template <Ties kTies>
static inline __m512i rounded_to_bfloat16(Vec32 values) {
  if constexpr (kTies == Ties::to_even)
    if (__builtin_expect(!any_denormal(values), true))
      return (__m512i)_mm512_cvtne2ps_pbh((__m512)values.second, (__m512)values.first);
  const __m512i upper_halves =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21, 19, 17,
                       15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16((__m512i)round_to_upper_halves<kTies>(values.first), upper_halves,
                                   (__m512i)round_to_upper_halves<kTies>(values.second));
}

// kTies: of numbers that are rounded; floats are not.
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(float* target, Vec16 values) {
  std::memcpy(target, &values, sizeof(values));
}
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(BFloat16* target, Vec16 values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), rounded_to_bfloat16<kTies>(values));
}

static inline Vec8 low_half(Vec16 values) { return (Vec8)_mm512_castps512_ps256((__m512)values); }
static inline Vec8 high_half(Vec16 values) { return (Vec8)_mm512_extractf32x8_ps((__m512)values, 1); }

template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(float* target, Vec16 values) {
  stream(target, low_half(values));
  stream(target + kLanes, high_half(values));
}
template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(BFloat16* target, Vec16 values) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), rounded_to_bfloat16<kTies>(values));
}

template <Ties kTies>
static inline void store_thirty_two(BFloat16* target, Vec32 values) {
  _mm512_storeu_si512(target, rounded_to_bfloat16<kTies>(values));
}
template <Ties kTies>
static inline void stream_thirty_two(BFloat16* target, Vec32 values) {
  const __m512i halves = rounded_to_bfloat16<kTies>(values);
  __m256i* const place = reinterpret_cast<__m256i*>(target);
  _mm256_stream_si256(place, _mm512_castsi512_si256(halves));
  _mm256_stream_si256(place + 1, _mm512_extracti64x4_epi64(halves, 1));
}

template <class T>
static inline Vec16 in_order_of(Vec16 values) {
  return values;
}
template <class T>
static inline Vec16 from_order_of(Vec16 values) {
  return values;
}
#else
static inline Vec16 load_sixteen(const float* source) { return {load(source), load(source + kLanes)}; }
static inline Vec16 load_sixteen(const BFloat16* source) {
  const Pairs pairs = load_pairs(source);
  return {pairs.even, pairs.odd};
}

// kTies: of numbers that are rounded; floats are not.
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(float* target, Vec16 values) {
  store(target, values.first);
  store(target + kLanes, values.second);
}
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(BFloat16* target, Vec16 values) {
  store_pairs<kTies>(target, {values.first, values.second});
}

template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(float* target, Vec16 values) {
  stream(target, values.first);
  stream(target + kLanes, values.second);
}
template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(BFloat16* target, Vec16 values) {
  stream_pairs<kTies>(target, {values.first, values.second});
}

template <class T>
static inline Vec16 in_order_of(Vec16 values) {
  if constexpr (sizeof(T) == sizeof(float)) return values;
  return {K5_SHUFFLE(values.first, values.second, 0, 2, 4, 6, 8, 10, 12, 14),
          K5_SHUFFLE(values.first, values.second, 1, 3, 5, 7, 9, 11, 13, 15)};
}

template <class T>
static inline Vec16 from_order_of(Vec16 values) {
  if constexpr (sizeof(T) == sizeof(float)) return values;
  return {K5_SHUFFLE(values.first, values.second, 0, 8, 1, 9, 2, 10, 3, 11),
          K5_SHUFFLE(values.first, values.second, 4, 12, 5, 13, 6, 14, 7, 15)};
}
#endif

// kTies: as of sixteen.
template <Ties kTies, class T>
static inline void store_thirty_two(T* target, Vec32 values) {
  store_sixteen<kTies>(target, values.first);
  store_sixteen<kTies>(target + 2 * kLanes, values.second);
}
template <Ties kTies, class T>
static inline void stream_thirty_two(T* target, Vec32 values) {
  stream_sixteen<kTies>(target, values.first);
  stream_sixteen<kTies>(target + 2 * kLanes, values.second);
}

}  // namespace k5
