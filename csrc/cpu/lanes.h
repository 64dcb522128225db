// Loops over a row of any width, eight values at a time. Everything here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vec_math.h"

namespace k5 {
namespace {

// Eight values of a row.
struct AllLanes {
  template <class T>
  Vec8 get(const T* source) const {
    return load(source);
  }
  template <bool kPastCaches = false, class T>
  void set(T* target, Vec8 value) const {
    if constexpr (kPastCaches) {
      stream(target, value);
    } else {
      store(target, value);
    }
  }
  // Leaves out lanes that are past the row's end.
  Vec8 keep(Vec8 value) const { return value; }
};

// The last `count` < 8 values of a row.
struct LastLanes {
  int64_t count;
  template <class T>
  Vec8 get(const T* source) const {
    return load_partial(source, count);
  }
  template <bool kPastCaches = false, class T>
  void set(T* target, Vec8 value) const {
    store_partial(target, value, count);
  }
  Vec8 keep(Vec8 value) const { return keep_first(value, count); }
};

constexpr int kParts = 4;

// Calls visit(i, part, lanes) for every eight values of a row, of which i is the first. Neighbours have another part,
// of kParts: sums kept one a part do not wait for each other.
template <class Visit>
inline __attribute__((always_inline)) void for_lanes(int64_t width, const Visit& visit) {
  const int64_t whole = width / kLanes * kLanes;
  int64_t i = 0;
  for (; i + kParts * kLanes <= whole; i += kParts * kLanes)
    for (int part = 0; part < kParts; part++) visit(i + part * kLanes, part, AllLanes{});
  for (; i < whole; i += kLanes) visit(i, 0, AllLanes{});
  if (i < width) visit(i, 1, LastLanes{width - i});
}

// Sixteen values of which the first `count` are those at `source`, then zeros.
template <class T>
struct Buffer {
  Buffer(const T* source, int64_t count) { std::memcpy(values, source, count * sizeof(T)); }
  T values[2 * kLanes] = {};
};

// Sixteen values, as pairs of any.
inline Pairs any_pairs(const float* source) { return {load(source), load(source + kLanes)}; }
inline Pairs any_pairs(const BFloat16* source) { return load_pairs(source); }

// Pairs of floats, and what belongs to pairs in the order of memory, in the order of a row of T.
template <class T>
inline Pairs in_pair_order(Pairs pairs) {
  if constexpr (sizeof(T) == sizeof(float)) return pairs;
  return reordered(pairs);
}
template <class T>
inline Vec8 from_memory_order(Vec8 values) {
  if constexpr (sizeof(T) == sizeof(float)) return reordered(values);
  return values;
}

// Sixteen values of a row of T, in its order (`Vec16` of wide_vec.h). `floats`: floats that belong to the row;
// `set_floats` writes such. `arranged`: of a row that is in its order already, with room for whole vectors.
struct AllSixteen {
  static constexpr int64_t kWidth = 2 * kLanes;
  template <class T>
  Vec16 get(const T* source) const {
    return load_sixteen(source);
  }
  template <class T>
  Vec16 floats(const float* source) const {
    return in_order_of<T>(load_sixteen(source));
  }
  Vec16 arranged(const float* source) const { return load_sixteen(source); }
  void set_arranged(float* target, Vec16 values) const { store_sixteen(target, values); }
  template <bool kPastCaches, Ties kTies = Ties::to_even, class T>
  void set(T* target, Vec16 values) const {
    if constexpr (kPastCaches) {
      stream_sixteen<kTies>(target, values);
    } else {
      store_sixteen<kTies>(target, values);
    }
  }
  template <class T>
  void set_floats(float* target, Vec16 values) const {
    store_sixteen(target, from_order_of<T>(values));
  }
  // Zero past the row's end.
  template <class T>
  Vec16 keep(Vec16 values) const {
    return values;
  }
};

// The last `count` < 16 values of a row; zeros are got for the others.
struct LastSixteen {
  static constexpr int64_t kWidth = 2 * kLanes;
  int64_t count;
  Vec16 arranged(const float* source) const { return load_sixteen(source); }
  void set_arranged(float* target, Vec16 values) const { store_sixteen(target, values); }
  template <class T>
  Vec16 get(const T* source) const {
    const Buffer<T> buffer(source, count);
    return load_sixteen(buffer.values);
  }
  template <class T>
  Vec16 floats(const float* source) const {
    return in_order_of<T>(get(source));
  }
  template <bool kPastCaches, Ties kTies = Ties::to_even, class T>
  void set(T* target, Vec16 values) const {
    T buffer[2 * kLanes];
    store_sixteen<kTies>(buffer, values);
    std::memcpy(target, buffer, count * sizeof(T));
  }
  template <class T>
  void set_floats(float* target, Vec16 values) const {
    set<false>(target, from_order_of<T>(values));
  }
  template <class T>
  Vec16 keep(Vec16 values) const {
    const Vec16 natural = from_order_of<T>(values);
    float buffer[2 * kLanes];
    store_sixteen(buffer, natural);
    return in_order_of<T>(get(static_cast<const float*>(buffer)));
  }
};

constexpr int kSums = 2;

// Calls visit(i, part, lanes) for every sixteen values of a row, of which i is the first. Neighbours have another part,
// of kSums: sums kept one a part do not wait for each other.
template <class Visit>
inline __attribute__((always_inline)) void for_sixteens(int64_t width, const Visit& visit) {
  constexpr int64_t kStep = 2 * kLanes;
  int64_t i = 0;
  for (; i + kSums * kStep <= width; i += kSums * kStep)
    for (int part = 0; part < kSums; part++) visit(i + part * kStep, part, AllSixteen{});
  if (i + kStep <= width) {
    visit(i, 0, AllSixteen{});
    i += kStep;
  }
  if (i < width) visit(i, 1, LastSixteen{width - i});
}

// Thirty-two values, as AllSixteen has sixteen.
struct AllThirtyTwo {
  static constexpr int64_t kHalf = 2 * kLanes, kWidth = 2 * kHalf;
  template <class T>
  Vec32 get(const T* source) const {
    return {load_sixteen(source), load_sixteen(source + kHalf)};
  }
  Vec32 arranged(const float* source) const { return get(source); }
  void set_arranged(float* target, Vec32 values) const { set<false>(target, values); }
  template <class T>
  void set_floats(float* target, Vec32 values) const {
    AllSixteen{}.set_floats<T>(target, values.first);
    AllSixteen{}.set_floats<T>(target + kHalf, values.second);
  }
  template <bool kPastCaches, Ties kTies = Ties::to_even, class T>
  void set(T* target, Vec32 values) const {
    if constexpr (kPastCaches) {
      stream_thirty_two<kTies>(target, values);
    } else {
      store_thirty_two<kTies>(target, values);
    }
  }
};

// Calls visit(i, lanes) for every thirty-two values of a row, then for the sixteens that are left: for long
// computations, whose constants do not fit the registers and are loaded for each block.
template <class ThirtyTwo = AllThirtyTwo, class Visit>
inline __attribute__((always_inline)) void for_thirty_twos(int64_t width, const Visit& visit) {
  constexpr int64_t kHalf = 2 * kLanes;
  int64_t i = 0;
  for (; i + 2 * kHalf <= width; i += 2 * kHalf) visit(i, ThirtyTwo{});
  if (i + kHalf <= width) {
    visit(i, AllSixteen{});
    i += kHalf;
  }
  if (i < width) visit(i, LastSixteen{width - i});
}

// Thirty-two values of a row of T, in the order of `load_even_odd` of wide_vec.h.
struct EvenOddThirtyTwo {
  static constexpr int64_t kHalf = 2 * kLanes, kWidth = 2 * kHalf;
  template <class T>
  Vec32 get(const T* source) const {
    return load_even_odd(source);
  }
  Vec32 arranged(const float* source) const { return {load_sixteen(source), load_sixteen(source + kHalf)}; }
  void set_arranged(float* target, Vec32 values) const { store_thirty_two<Ties::to_even>(target, values); }
  template <class T>
  Vec32 floats(const float* source) const {
    return in_even_odd_order<T>(arranged(source));
  }
  template <class T>
  void set_floats(float* target, Vec32 values) const {
    set_arranged(target, from_even_odd_order<T>(values));
  }
  template <bool kPastCaches, Ties kTies, class T>
  void set(T* target, Vec32 values) const {
    if constexpr (kPastCaches) {
      stream_even_odd<kTies>(target, values);
    } else {
      store_even_odd<kTies>(target, values);
    }
  }
};

// A row of floats in the order in which `for_thirty_twos<EvenOddThirtyTwo>` takes a row of T; target holds
// whole_sixteens(width).
template <class T>
inline void arrange_even_odd(float* target, const float* source, int64_t width) {
  for_thirty_twos<EvenOddThirtyTwo>(width, [&](int64_t i, auto lanes) {
    lanes.set_arranged(target + i, lanes.template floats<T>(source + i));
  });
}

// One or two places of a memory that are computed together: with the 32 registers of AVX-512 two, whose instructions
// need not wait for each other. `same`: what belongs to both. `sum`: of both.
template <class Lanes>
struct OnePlace {
  static constexpr int64_t kWidth = Lanes::kWidth;
  Lanes lanes;
  template <class T>
  auto get(const T* source) const {
    return lanes.get(source);
  }
  template <bool kPastCaches, Ties kTies, class T, class V>
  void set(T* target, V values) const {
    lanes.template set<kPastCaches, kTies>(target, values);
  }
  template <class V>
  V same(V value) const {
    return value;
  }
  template <class V>
  V sum(V values) const {
    return values;
  }
};
template <class Lanes>
struct TwoPlaces {
  static constexpr int64_t kWidth = 2 * Lanes::kWidth;
  Lanes lanes;
  int64_t apart;
  template <class T>
  auto get(const T* source) const {
    const auto first = lanes.get(source);
    return Twice<std::remove_const_t<decltype(first)>>{first, lanes.get(source + apart)};
  }
  template <bool kPastCaches, Ties kTies, class T, class V>
  void set(T* target, Twice<V> values) const {
    lanes.template set<kPastCaches, kTies>(target, values.first);
    lanes.template set<kPastCaches, kTies>(target + apart, values.second);
  }
  template <class V>
  Twice<V> same(V value) const {
    return {value, value};
  }
  template <class V>
  V sum(Twice<V> values) const {
    return values.first + values.second;
  }
};

#ifdef __AVX512F__
constexpr bool kTakesTwoPlaces = true;
#else
constexpr bool kTakesTwoPlaces = false;
#endif

// Calls visit(place, places) for `count` places that are so far apart, the first of them at `place`.
template <class Lanes, class Visit>
inline __attribute__((always_inline)) void for_places(int64_t place, int64_t count, int64_t apart, Lanes lanes,
                                                      const Visit& visit) {
  const int64_t end = place + count * apart;
  if constexpr (kTakesTwoPlaces)
    for (; place + apart < end; place += 2 * apart) visit(place, TwoPlaces<Lanes>{lanes, apart});
  for (; place < end; place += apart) visit(place, OnePlace<Lanes>{lanes});
}

// The same for a row of values that all belong together: their order is of no account.
template <class Visit>
inline __attribute__((always_inline)) void for_run(int64_t width, const Visit& visit) {
  constexpr int64_t kStep = EvenOddThirtyTwo::kWidth;
  const int64_t whole = width / kStep * kStep;
  for_places(0, width / kStep, kStep, EvenOddThirtyTwo{}, visit);
  for_thirty_twos<EvenOddThirtyTwo>(
      width - whole, [&](int64_t i, auto lanes) { visit(whole + i, OnePlace<decltype(lanes)>{lanes}); });
}

// Calls visit(i, part, lanes), as `for_sixteens` or with AVX-512 for thirty-two: a cache line of bfloat16.
template <class Visit>
inline __attribute__((always_inline)) void for_lines(int64_t width, const Visit& visit) {
#ifdef __AVX512F__
  for_thirty_twos(width, [&](int64_t i, auto lanes) { visit(i, 0, lanes); });
#else
  for_sixteens(width, visit);
#endif
}

// Calls visit(i, lanes) for the values of rows of several types, each in the order of memory: eight at a time, with
// AVX-512 thirty-two.
template <class Visit>
inline __attribute__((always_inline)) void for_values(int64_t width, const Visit& visit) {
#ifdef __AVX512F__
  for_thirty_twos(width, visit);
#else
  for_lanes(width, [&](int64_t i, int, auto lanes) { visit(i, lanes); });
#endif
}

inline float sum_of_parts(const Vec16 (&parts)[kSums]) {
  static_assert(kSums == 2);
  return sum(parts[0] + parts[1]);
}

// A row of floats in the order of a row of T; target holds whole_sixteens(width).
template <class T>
inline void arrange(float* target, const float* source, int64_t width) {
  for_sixteens(width, [&](int64_t i, int, auto lanes) {
    store_sixteen(target + i, lanes.template floats<T>(source + i));
  });
}

// Eight pairs of a row of T. `floats`: floats that belong to the row, in the order of its pairs. `half`: what belongs
// to each pair, in an array of half the row's width.
struct AllPairs {
  using V = Vec8;
  static constexpr int64_t kWidth = 2 * kLanes;
  template <class T>
  Pairs get(const T* source) const {
    return load_pairs(source);
  }
  template <class T>
  Pairs floats(const float* source) const {
    return in_pair_order<T>(load_pairs(source));
  }
  template <class T>
  Vec8 half(const float* source) const {
    return from_memory_order<T>(load(source));
  }
  // All values, as pairs of any.
  template <class T>
  Pairs any(const T* source) const {
    return any_pairs(source);
  }
  template <bool kPastCaches, Ties kTies = Ties::to_even, class T>
  void set(T* target, Pairs pairs) const {
    if constexpr (kPastCaches) {
      stream_pairs<kTies>(target, pairs);
    } else {
      store_pairs<kTies>(target, pairs);
    }
  }
  template <class T>
  void set_floats(float* target, Pairs pairs) const {
    store_pairs(target, in_pair_order<T>(pairs));
  }
};

// The last `count` < 8 pairs of a row; zeros are got for the others.
struct LastPairs {
  using V = Vec8;
  static constexpr int64_t kWidth = AllPairs::kWidth;
  int64_t count;
  template <class T>
  Pairs get(const T* source) const {
    const Buffer<T> buffer(source, 2 * count);
    return load_pairs(buffer.values);
  }
  template <class T>
  Pairs floats(const float* source) const {
    return in_pair_order<T>(get(source));
  }
  template <class T>
  Vec8 half(const float* source) const {
    return from_memory_order<T>(load_partial(source, count));
  }
  template <class T>
  Pairs any(const T* source) const {
    const Buffer<T> buffer(source, 2 * count);
    return any_pairs(buffer.values);
  }
  template <bool kPastCaches, Ties kTies = Ties::to_even, class T>
  void set(T* target, Pairs pairs) const {
    T buffer[2 * kLanes];
    store_pairs<kTies>(buffer, pairs);
    std::memcpy(target, buffer, 2 * count * sizeof(T));
  }
  template <class T>
  void set_floats(float* target, Pairs pairs) const {
    set<false>(target, in_pair_order<T>(pairs));
  }
};

// The most pairs of a row of T that are taken at a time: eight, with AVX-512 of bfloat16 sixteen.
#ifdef __AVX512F__
struct SixteenPairs : EvenOddThirtyTwo {
  using V = Vec16;
  template <class T>
  Vec16 half(const float* source) const {
    return load_sixteen(source);
  }
  template <class T>
  Vec32 any(const T* source) const {
    return get(source);
  }
};
template <class T>
using MostPairs = std::conditional_t<sizeof(T) == sizeof(float), AllPairs, SixteenPairs>;
#else
template <class T>
using MostPairs = AllPairs;
#endif

// Calls visit(i, lanes) for all pairs of a row of T of even width, of which i is the number of the first value.
template <class T, class Visit>
inline __attribute__((always_inline)) void for_pairs(int64_t width, const Visit& visit) {
  constexpr int64_t kMost = MostPairs<T>::kWidth;
  int64_t i = 0;
  for (; i + kMost <= width; i += kMost) visit(i, MostPairs<T>{});
  if constexpr (kMost > AllPairs::kWidth)
    if (i + AllPairs::kWidth <= width) {
      visit(i, AllPairs{});
      i += AllPairs::kWidth;
    }
  if (i < width) visit(i, LastPairs{(width - i) / 2});
}

inline float sum_of_parts(const Vec8 (&parts)[kParts]) {
  static_assert(kParts == 4);
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

}  // namespace
}  // namespace k5
