// Which blocks are within half a window of each other.
#pragma once

#include <cstdint>

#include "isa.h"

namespace k5 {

// coordinates: (clip, t, y, x) of each block, ascending; reach: half a window along t, y and x.
struct StaWindow {
  const int64_t* coordinates;
  int64_t blocks;
  int64_t reach[3];
};

#define K5_DECLARE_STA_MASK(isa)                                                                      \
  namespace isa {                                                                                     \
  /* How many blocks each of the blocks numbered first to end reads. */                               \
  void sta_counts(const StaWindow& op, int64_t* counts, int64_t first, int64_t end);                  \
  /* Which ones, each list from indices + its offset on. */                                           \
  void sta_lists(const StaWindow& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end); \
  }
K5_DECLARE_STA_MASK(portable)
K5_DECLARE_STA_MASK(avx2)
#undef K5_DECLARE_STA_MASK

}  // namespace k5
