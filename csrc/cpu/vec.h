// Eight floats at a time, through the compiler's vector extension: the same source is compiled to AVX-512, to AVX2 or to
// the target's baseline, depending on the compiler's flags (csrc/cpu/isa.h). Functions are static: otherwise the linker
// would keep one copy for both builds, and a processor without AVX2 might run the AVX2 copy.
#pragma once

#include <cstdint>
#include <cstring>

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

constexpr int64_t kLanes = 8, kStreamBytes = 32;

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

// Where a number goes that is as near to one bfloat16 as to another. `to_even` is the rule of IEEE 754. `away` from
// zero takes one instruction instead of six; it is for results of approximations, of which a tie says nothing. With it
// the lower half of a NaN must be zero, as it is where arithmetic makes one of numbers, or of the NaNs of bfloat16.
enum class Ties { to_even, away };

// Rounded to the nearest bfloat16, whose bits are the upper halves. A NaN stays a NaN.
template <Ties kTies = Ties::to_even>
static inline UVec8 round_to_upper_halves(Vec8 value) {
  const UVec8 bits = bits_as<UVec8>(value);
  if constexpr (kTies == Ties::away) return bits + 0x8000u;
  return value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : UVec8{} + 0x7fc00000u;
}

static inline HVec8 rounded_to_bfloat16(Vec8 value) { return narrow(round_to_upper_halves(value) >> 16); }

// A NaN with a lower half of zero in place of any other.
static inline float with_plain_nan(float value) { return value == value ? value : bits_as<float>(0x7fc00000u); }
static inline Vec8 with_plain_nan(Vec8 value) { return value == value ? value : splat(bits_as<float>(0x7fc00000u)); }

static inline void store(BFloat16* target, Vec8 value) {
  const HVec8 half = rounded_to_bfloat16(value);
  std::memcpy(target, &half, sizeof(half));
}

// The product, rounded: without this the compiler may fuse it with an addition that follows, which rounds once.
static inline Vec8 rounded(Vec8 product) {
#ifdef __AVX2__
  asm("" : "+x"(product));
#endif
  return product;
}

// Writes past the caches, for results larger than the caches: an ordinary store would read each line before it is
// overwritten, and write it back later all the same. The target must be aligned to what one call writes, at most
// kStreamBytes. Other threads may read what was written only after a call of `end_of_stream`.
static inline void stream(float* target, Vec8 value) {
#ifdef __AVX2__
  _mm256_stream_ps(target, (__m256)value);
#else
  store(target, value);
#endif
}

static inline void stream(BFloat16* target, Vec8 value) {
#ifdef __AVX2__
  _mm_stream_si128(reinterpret_cast<__m128i*>(target), (__m128i)rounded_to_bfloat16(value));
#else
  store(target, value);
#endif
}

// Copies bytes, whole kStreamBytes, from one place that is aligned to them to another.
static inline void stream_bytes(void* target, const void* source, int64_t bytes) {
#ifdef __AVX2__
  for (int64_t i = 0; i < bytes / kStreamBytes; i++)
    _mm256_stream_si256(static_cast<__m256i*>(target) + i, _mm256_load_si256(static_cast<const __m256i*>(source) + i));
#else
  std::memcpy(target, source, bytes);
#endif
}

static inline void end_of_stream() {
#ifdef __AVX2__
  _mm_sfence();
#endif
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

// Lanes of two vectors, by number: those of the second are 8 to 15.
#ifdef __clang__
#define K5_SHUFFLE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define K5_SHUFFLE(one, other, ...) __builtin_shuffle(one, other, UVec8{__VA_ARGS__})
#endif

// Two vectors that take each step of a computation together.
template <class V>
struct Twice {
  V first, second;
};

// Eight pairs of neighbours in memory, the even ones first. Those of floats stand in the order 0, 1, 4, 5, 2, 3, 6, 7,
// which costs half as many shuffles; those of bfloat16 in their own.
using Pairs = Twice<Vec8>;

static inline Pairs load_pairs(const float* source) {
  const Vec8 low = load(source), high = load(source + kLanes);
  return {K5_SHUFFLE(low, high, 0, 2, 8, 10, 4, 6, 12, 14), K5_SHUFFLE(low, high, 1, 3, 9, 11, 5, 7, 13, 15)};
}

static inline Vec8 low_half(Pairs pairs) { return K5_SHUFFLE(pairs.first, pairs.second, 0, 8, 1, 9, 4, 12, 5, 13); }
static inline Vec8 high_half(Pairs pairs) { return K5_SHUFFLE(pairs.first, pairs.second, 2, 10, 3, 11, 6, 14, 7, 15); }

// From one of the two orders to the other.
static inline Vec8 reordered(Vec8 value) { return K5_SHUFFLE(value, value, 0, 1, 4, 5, 2, 3, 6, 7); }
static inline Pairs reordered(Pairs pairs) { return {reordered(pairs.first), reordered(pairs.second)}; }

// kTies: of numbers that are rounded; floats are not.
template <Ties kTies = Ties::to_even>
static inline void store_pairs(float* target, Pairs pairs) {
  store(target, low_half(pairs));
  store(target + kLanes, high_half(pairs));
}

template <Ties kTies = Ties::to_even>
static inline void stream_pairs(float* target, Pairs pairs) {
  stream(target, low_half(pairs));
  stream(target + kLanes, high_half(pairs));
}

// A pair of bfloat16 is a 32-bit integer with the even one in its lower half.
static inline Pairs load_pairs(const BFloat16* source) {
  UVec8 both;
  std::memcpy(&both, source, sizeof(both));
  return {bits_as<Vec8>(both << 16), bits_as<Vec8>(both & 0xffff0000u)};
}

template <Ties kTies>
static inline UVec8 rounded_to_bfloat16(Pairs pairs) {
  const UVec8 even = round_to_upper_halves<kTies>(pairs.first) >> 16, odd = round_to_upper_halves<kTies>(pairs.second);
#ifdef __AVX2__
  return (UVec8)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#else
  return even | (odd & 0xffff0000u);
#endif
}

template <Ties kTies = Ties::to_even>
static inline void store_pairs(BFloat16* target, Pairs pairs) {
  const UVec8 both = rounded_to_bfloat16<kTies>(pairs);
  std::memcpy(target, &both, sizeof(both));
}

template <Ties kTies = Ties::to_even>
static inline void stream_pairs(BFloat16* target, Pairs pairs) {
#ifdef __AVX2__
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target), (__m256i)rounded_to_bfloat16<kTies>(pairs));
#else
  store_pairs<kTies>(target, pairs);
#endif
}

}  // namespace k5
