// Sixteen and thirty-two floats at a time. Functions are static, for the reason in vec.h.
#pragma once

#include "vec.h"

namespace k5 {

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
static inline Vec16 with_plain_nan(Vec16 value) {
  return value == value ? value : Vec16{} + bits_as<float>(0x7fc00000u);
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

// In one write where it is a whole cache line: two take longer.
static inline void stream_line(void* target, __m512i values) {
  if (__builtin_expect(reinterpret_cast<uintptr_t>(target) % sizeof(values) == 0, true))
    return _mm512_stream_si512(static_cast<__m512i*>(target), values);
  __m256i* const place = static_cast<__m256i*>(target);
  _mm256_stream_si256(place, _mm512_castsi512_si256(values));
  _mm256_stream_si256(place + 1, _mm512_extracti64x4_epi64(values, 1));
}

template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(float* target, Vec16 values) {
  stream_line(target, (__m512i)values);
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
  stream_line(target, rounded_to_bfloat16<kTies>(values));
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
static inline Vec16 load_sixteen(const BFloat16* source) { return load_pairs(source); }

// kTies: of numbers that are rounded; floats are not.
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(float* target, Vec16 values) {
  store(target, values.first);
  store(target + kLanes, values.second);
}
template <Ties kTies = Ties::to_even>
static inline void store_sixteen(BFloat16* target, Vec16 values) {
  store_pairs<kTies>(target, values);
}

template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(float* target, Vec16 values) {
  stream(target, values.first);
  stream(target + kLanes, values.second);
}
template <Ties kTies = Ties::to_even>
static inline void stream_sixteen(BFloat16* target, Vec16 values) {
  stream_pairs<kTies>(target, values);
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

// Thirty-two values of a row in another order, for those that need not be in that of `Vec16`: with AVX-512 bfloat16 of
// even places first, which takes fewer instructions. `in_even_odd_order<T>` brings floats that belong to a row of T
// into it, `from_even_odd_order<T>` undoes that.
template <class T>
static inline Vec32 load_even_odd(const T* source) {
  return {load_sixteen(source), load_sixteen(source + 2 * kLanes)};
}
template <Ties kTies, class T>
static inline void store_even_odd(T* target, Vec32 values) {
  store_thirty_two<kTies>(target, values);
}
template <Ties kTies, class T>
static inline void stream_even_odd(T* target, Vec32 values) {
  stream_thirty_two<kTies>(target, values);
}
#ifdef __AVX512F__
static inline Vec32 load_even_odd(const BFloat16* source) {
  const __m512i both = _mm512_loadu_si512(source);
  return {(Vec16)_mm512_slli_epi32(both, 16), (Vec16)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))};
}
template <Ties kTies>
static inline __m512i bfloat16_of_even_odd(Vec32 values) {
  const __m512i even = _mm512_srli_epi32((__m512i)round_to_upper_halves<kTies>(values.first), 16);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, even, (__m512i)round_to_upper_halves<kTies>(values.second));
}
template <Ties kTies>
static inline void store_even_odd(BFloat16* target, Vec32 values) {
  _mm512_storeu_si512(target, bfloat16_of_even_odd<kTies>(values));
}
template <Ties kTies>
static inline void stream_even_odd(BFloat16* target, Vec32 values) {
  stream_line(target, bfloat16_of_even_odd<kTies>(values));
}
template <class T>
static inline Vec32 in_even_odd_order(Vec32 values) {
  if constexpr (sizeof(T) == sizeof(float)) return values;
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512 low = (__m512)values.first, high = (__m512)values.second;
  return {(Vec16)_mm512_permutex2var_ps(low, even, high), (Vec16)_mm512_permutex2var_ps(low, odd, high)};
}
template <class T>
static inline Vec32 from_even_odd_order(Vec32 values) {
  if constexpr (sizeof(T) == sizeof(float)) return values;
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  const __m512 even = (__m512)values.first, odd = (__m512)values.second;
  return {(Vec16)_mm512_permutex2var_ps(even, low, odd), (Vec16)_mm512_permutex2var_ps(even, high, odd)};
}
#else
template <class T>
static inline Vec32 in_even_odd_order(Vec32 values) {
  return {in_order_of<T>(values.first), in_order_of<T>(values.second)};
}
template <class T>
static inline Vec32 from_even_odd_order(Vec32 values) {
  return {from_order_of<T>(values.first), from_order_of<T>(values.second)};
}
#endif

}  // namespace k5
