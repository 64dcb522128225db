// Eight floats at a time, through the compiler's vector extension: the same source is compiled to AVX2 or to the
// target's baseline, depending on the compiler's flags (csrc/cpu/isa.h). Functions are static: otherwise the linker
// would keep one copy for both builds, and a processor without AVX2 might run the AVX2 copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace k5 {

struct BFloat16 {
  uint16_t bits;
};

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef uint32_t UVec8 __attribute__((vector_size(32)));
typedef int32_t IVec8 __attribute__((vector_size(32)));
typedef uint16_t HVec8 __attribute__((vector_size(16)));

constexpr int64_t kLanes = 8;

// The bits of a value as a value of another type.
template <class To, class From>
static inline __attribute__((always_inline)) To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

static inline Vec8 splat(float value) { return Vec8{} + value; }

static inline Vec8 load(const float* source) {
  Vec8 value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

// Eight 16-bit integers from and to the low halves of eight 32-bit ones. In intrinsics for AVX2 because GCC compiles
// the plain expression to four instructions instead of one.
static inline UVec8 widen(HVec8 half) {
#ifdef __AVX2__
  return (UVec8)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, UVec8);
#endif
}

static inline HVec8 narrow(UVec8 whole) {
#ifdef __AVX2__
  const __m256i value = (__m256i)whole;
  return (HVec8)_mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
#else
  return __builtin_convertvector(whole, HVec8);
#endif
}

static inline Vec8 load(const BFloat16* source) {
  HVec8 half;
  std::memcpy(&half, source, sizeof(half));
  return bits_as<Vec8>(widen(half) << 16);
}

static inline void store(float* target, Vec8 value) { std::memcpy(target, &value, sizeof(value)); }

// Rounds to nearest even; a NaN stays a NaN.
static inline void store(BFloat16* target, Vec8 value) {
  const UVec8 bits = bits_as<UVec8>(value);
  const UVec8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const HVec8 half = narrow(value == value ? rounded : UVec8{} + 0x7fc0u);
  std::memcpy(target, &half, sizeof(half));
}

// The first `count` < 8 lanes: loads zeros for the others, and does not store the others.
template <class T>
static inline Vec8 load_partial(const T* source, int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, source, count * sizeof(T));
  return load(buffer);
}

template <class T>
static inline void store_partial(T* target, Vec8 value, int64_t count) {
  T buffer[kLanes];
  store(buffer, value);
  std::memcpy(target, buffer, count * sizeof(T));
}

// Zero in all but the first `count` lanes.
static inline Vec8 keep_first(Vec8 value, int64_t count) {
  for (int64_t lane = count; lane < kLanes; lane++) value[lane] = 0;
  return value;
}

// (a, b, c, d, …) becomes (b, a, d, c, …).
static inline Vec8 swap_pairs(Vec8 value) {
#ifdef __clang__
  return __builtin_shufflevector(value, value, 1, 0, 3, 2, 5, 4, 7, 6);
#else
  return __builtin_shuffle(value, UVec8{1, 0, 3, 2, 5, 4, 7, 6});
#endif
}

// e^value, accurate to about one unit in the last place; values are clamped to ±87. value = whole · ln(2) + rest with
// |rest| <= ln(2)/2: 2^whole is written into the exponent, e^rest is a polynomial.
static inline Vec8 exp(Vec8 value) {
  const Vec8 limit = splat(87.0f);
  value = value > limit ? limit : value;
  value = value < -limit ? -limit : value;
  const Vec8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const Vec8 shifted = value * 1.44269504f + magic;
  const Vec8 whole = shifted - magic;
  const Vec8 rest = value - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln(2) in two parts, for accuracy
  Vec8 polynomial = splat(1.0f / 5040);
  for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    polynomial = polynomial * rest + coefficient;
  return polynomial * bits_as<Vec8>((bits_as<UVec8>(shifted) - 0x4b400000u + 127u) << 23);
}

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

}  // namespace k5
