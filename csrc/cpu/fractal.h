// Tokens of a clip from row-major to fractal order and back: runs of a patch's width are copied as they are.
#pragma once

#include <cstdint>

#include "isa.h"

namespace k5 {

// [batch, frames, height, width] tokens of token_bytes each; a sample of the source starts every source_batch_bytes.
// to_fractal: the source is row-major and the target in fractal order, or the reverse.
struct FractalCopy {
  const char* source;
  char* target;
  int64_t frames, height, width, patch;
  int64_t token_bytes, source_batch_bytes;
  bool to_fractal;
};

#define K5_DECLARE_FRACTAL(isa)                                                 \
  namespace isa {                                                               \
  /* Rows of tokens numbered first to end over (batch, frame, row of tokens). */ \
  void fractal_copy(const FractalCopy& op, int64_t first, int64_t end);         \
  }
K5_DECLARE_FRACTAL(portable)
K5_DECLARE_FRACTAL(avx2)
#undef K5_DECLARE_FRACTAL

}  // namespace k5
