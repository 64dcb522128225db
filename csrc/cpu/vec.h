// Eight floats at a time, through the compiler's vector extension: the same source is compiled to AVX-512, to AVX2 or to
// the target's baseline, depending on the compiler's flags (csrc/cpu/isa.h). Functions are static: otherwise the linker
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

// Eight pairs of neighbours in memory. Those of floats stand in the order 0, 1, 4, 5, 2, 3, 6, 7, which costs half as
// many shuffles; those of bfloat16 in their own.
struct Pairs {
  Vec8 even, odd;
};

static inline Pairs load_pairs(const float* source) {
  const Vec8 low = load(source), high = load(source + kLanes);
  return {K5_SHUFFLE(low, high, 0, 2, 8, 10, 4, 6, 12, 14), K5_SHUFFLE(low, high, 1, 3, 9, 11, 5, 7, 13, 15)};
}

static inline Vec8 low_half(Pairs pairs) { return K5_SHUFFLE(pairs.even, pairs.odd, 0, 8, 1, 9, 4, 12, 5, 13); }
static inline Vec8 high_half(Pairs pairs) { return K5_SHUFFLE(pairs.even, pairs.odd, 2, 10, 3, 11, 6, 14, 7, 15); }

// From one of the two orders to the other.
static inline Vec8 reordered(Vec8 value) { return K5_SHUFFLE(value, value, 0, 1, 4, 5, 2, 3, 6, 7); }
static inline Pairs reordered(Pairs pairs) { return {reordered(pairs.even), reordered(pairs.odd)}; }

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
  const UVec8 even = round_to_upper_halves<kTies>(pairs.even) >> 16, odd = round_to_upper_halves<kTies>(pairs.odd);
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
static inline Vec32 above_floor(Vec32 value) { return {above_floor(value.first), above_floor(value.second)}; }
static inline Vec32 scaled_by_floor(Vec32 value, Vec32 exponent) {
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
static inline float sum(Vec16 value) { return sum(low_half(value) + high_half(value)); }
#endif
template <class V>
static inline float sum(Twice<V> value) {
  return sum(value.first + value.second);
}

}  // namespace k5
