#include "fractal.h"

#include <cstring>

namespace k5::K5_ISA {

void fractal_copy(const FractalCopy& op, int64_t first, int64_t end) {
  const int64_t frame = op.height * op.width;
  for (int64_t item = first; item < end; item++) {
    const int64_t sample = item / (op.frames * op.height), row = item % (op.frames * op.height);
    const int64_t y = row % op.height, block_y = y / op.block_side * op.block_side;
    const int64_t block_height = op.height - block_y < op.block_side ? op.height - block_y : op.block_side;
    // In a frame, a block comes after the rows of blocks above it and after the blocks to its left, which are as high
    // as itself.
    const int64_t block_row = row / op.height * frame + block_y * op.width;
    const char* source = op.source + sample * op.source_batch_bytes;
    char* target = op.target + sample * op.frames * frame * op.token_bytes;
    for (int64_t x = 0; x < op.width; x += op.block_side) {
      const int64_t run = op.width - x < op.block_side ? op.width - x : op.block_side;
      const int64_t fractal = block_row + x * block_height + (y - block_y) * run, plain = row * op.width + x;
      std::memcpy(target + (op.to_fractal ? fractal : plain) * op.token_bytes,
                  source + (op.to_fractal ? plain : fractal) * op.token_bytes, run * op.token_bytes);
    }
  }
}

}  // namespace k5::K5_ISA
