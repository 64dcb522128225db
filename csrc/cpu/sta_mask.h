// Sliding-Tile Attention: which blocks are within half a window of each other.
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
  /* The number of blocks that each of the blocks from first to end reads. */                         \
  void sta_counts(const StaWindow& op, int64_t* counts, int64_t first, int64_t end);                  \
  /* Writes the lists of these blocks, each from its offset in indices on. */                         \
  void sta_lists(const StaWindow& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end); \
  }
K5_DECLARE_STA_MASK(portable)
K5_DECLARE_STA_MASK(avx2)
#undef K5_DECLARE_STA_MASK

}  // namespace k5
