// Loops over a row of any width, eight values at a time. Everything here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

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

// Eight pairs of a row; `half`: what belongs to each pair, in an array of half the row's width.
struct AllPairs {
  template <class T>
  Pairs get(const T* source) const {
    return load_pairs(source);
  }
  Vec8 half(const float* source) const { return load(source); }
  template <bool kPastCaches, class T>
  void set(T* target, Pairs pairs) const {
    if constexpr (kPastCaches) {
      stream_pairs(target, pairs);
    } else {
      store_pairs(target, pairs);
    }
  }
};

// The last `count` < 8 pairs of a row; zeros are got for the others.
struct LastPairs {
  int64_t count;
  template <class T>
  Pairs get(const T* source) const {
    T buffer[2 * kLanes] = {};
    std::memcpy(buffer, source, 2 * count * sizeof(T));
    return load_pairs(buffer);
  }
  Vec8 half(const float* source) const { return load_partial(source, count); }
  template <bool kPastCaches, class T>
  void set(T* target, Pairs pairs) const {
    T buffer[2 * kLanes];
    store_pairs(buffer, pairs);
    std::memcpy(target, buffer, 2 * count * sizeof(T));
  }
};

// Calls visit(i, lanes) for every eight pairs of a row of even width; i is the number of the first value.
template <class Visit>
inline __attribute__((always_inline)) void for_pairs(int64_t width, const Visit& visit) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) visit(i, AllPairs{});
  if (i < width) visit(i, LastPairs{(width - i) / 2});
}

inline float sum_of_parts(const Vec8 (&parts)[kParts]) {
  static_assert(kParts == 4);
  return sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

}  // namespace
}  // namespace k5
