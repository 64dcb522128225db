#include "sta_mask.h"

namespace k5::K5_ISA {
namespace {

bool near(int64_t one, int64_t other, int64_t reach) { return one - other <= reach && other - one <= reach; }

// The first block of frame t of a clip, or of what comes after it where there is no such frame.
int64_t frame_start(const StaWindow& op, int64_t clip, int64_t t) {
  int64_t low = 0, high = op.blocks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const int64_t* block = op.coordinates + 4 * middle;
    if (block[0] < clip || (block[0] == clip && block[1] < t))
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Calls found(key) for every block that the row reads, in ascending order. Only the frames in reach are searched; they
// are contiguous.
template <class Found>
void for_near(const StaWindow& op, int64_t row, const Found& found) {
  const int64_t* own = op.coordinates + 4 * row;
  const int64_t last = frame_start(op, own[0], own[1] + op.reach[0] + 1);
  for (int64_t key = frame_start(op, own[0], own[1] - op.reach[0]); key < last; key++) {
    const int64_t* other = op.coordinates + 4 * key;
    if (near(own[2], other[2], op.reach[1]) && near(own[3], other[3], op.reach[2])) found(key);
  }
}

}  // namespace

void sta_counts(const StaWindow& op, int64_t* counts, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; row++) {
    int64_t count = 0;
    for_near(op, row, [&](int64_t) { count++; });
    counts[row] = count;
  }
}

void sta_lists(const StaWindow& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end) {
  for (int64_t row = first; row < end; row++) {
    int32_t* next = indices + offsets[row];
    for_near(op, row, [&](int64_t key) { *next++ = static_cast<int32_t>(key); });
  }
}

}  // namespace k5::K5_ISA
