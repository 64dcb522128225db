#include "fractal.h"

#include <cstring>

namespace k5::K5_ISA {

void fractal_copy(const FractalCopy& op, int64_t first, int64_t end) {
  const int64_t frame = op.height * op.width;
  for (int64_t item = first; item < end; item++) {
    const int64_t sample = item / (op.frames * op.height), row = item % (op.frames * op.height);
    const int64_t y = row % op.height, patch_y = y / op.patch * op.patch;
    const int64_t patch_height = op.height - patch_y < op.patch ? op.height - patch_y : op.patch;
    // Before a patch stand the rows of patches above it and, as high as itself, the patches to its left.
    const int64_t patch_row = row / op.height * frame + patch_y * op.width;
    const char* source = op.source + sample * op.source_batch_bytes;
    char* target = op.target + sample * op.frames * frame * op.token_bytes;
    for (int64_t x = 0; x < op.width; x += op.patch) {
      const int64_t run = op.width - x < op.patch ? op.width - x : op.patch;
      const int64_t fractal = patch_row + x * patch_height + (y - patch_y) * run, plain = row * op.width + x;
      std::memcpy(target + (op.to_fractal ? fractal : plain) * op.token_bytes,
                  source + (op.to_fractal ? plain : fractal) * op.token_bytes, run * op.token_bytes);
    }
  }
}

}  // namespace k5::K5_ISA
