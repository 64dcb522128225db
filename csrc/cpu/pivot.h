// A number near the mean of a run of values, to be subtracted from them before they are added up in one pass with their
// squares. Everything here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace k5 {
namespace {

inline float load_one(const float* source) { return *source; }
inline float load_one(const BFloat16* source) { return bits_as<float>(uint32_t{source->bits} << 16); }

// The pivot is the mean of the run's first values, at least an eighth of it: then the squares of differences from it
// are at most eight times as large as those of differences from the mean, and cancellation costs less than a digit.
constexpr int64_t kPivotShare = 8;

inline int64_t pivot_values(int64_t count) { return (count + kPivotShare - 1) / kPivotShare; }

// Of `count` > 0 values. origin: any of them, or one like them; it is subtracted before anything is added up, so that a
// large mean costs no digits.
template <class T>
inline float pivot_of(const T* run, int64_t count, float origin) {
  const int64_t values = pivot_values(count);
  Vec16 sums[kSums] = {};
  for_sixteens(values, [&](int64_t i, int part, auto lanes) {
    sums[part] = sums[part] + lanes.template keep<T>(lanes.get(run + i) - origin);
  });
  return origin + sum_of_parts(sums) / values;
}

}  // namespace
}  // namespace k5
