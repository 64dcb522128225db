#include "pieces.h"

#include "isa.h"

namespace k5::K5_ISA {

void add_pieces(const PieceSums& op, int64_t first_block, int64_t end_block) {
  const int64_t blocks = column_blocks(op.width);
  for (int64_t block = first_block; block < end_block; block++) {
    const int64_t segment = block / blocks, first = block % blocks * kColumnsOfSums;
    const int64_t columns = op.width - first < kColumnsOfSums ? op.width - first : kColumnsOfSums;
    double totals[kColumnsOfSums] = {};
    for (int64_t piece = op.first_pieces[segment]; piece < op.first_pieces[segment + 1]; piece++) {
      const float* row = op.pieces + piece * op.width + first;
      for (int64_t i = 0; i < columns; i++) totals[i] += row[i];
    }
    float* sums = op.sums + segment * op.width + first;
    for (int64_t i = 0; i < columns; i++) sums[i] = static_cast<float>(totals[i]);
  }
}

}  // namespace k5::K5_ISA
