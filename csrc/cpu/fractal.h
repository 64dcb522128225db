// Tokens of a clip from row-major to fractal order and back: the tokens of one row of a block are contiguous in both
// orders and are copied together.
#pragma once

#include <cstdint>

#include "isa.h"

namespace k5 {

// [batch, frames, height, width] tokens of token_bytes each; the samples of the source are source_batch_bytes apart.
// to_fractal: from row-major to fractal order; otherwise the reverse.
struct FractalCopy {
  const char* source;
  char* target;
  int64_t frames, height, width, block_side;
  int64_t token_bytes, source_batch_bytes;
  bool to_fractal;
};

#define K5_DECLARE_FRACTAL(isa)                                                 \
  namespace isa {                                                               \
  /* Rows of tokens, numbered over (batch, frame, height), from first to end. */ \
  void fractal_copy(const FractalCopy& op, int64_t first, int64_t end);         \
  }
K5_DECLARE_FRACTAL(portable)
K5_DECLARE_FRACTAL(avx2)
#undef K5_DECLARE_FRACTAL

}  // namespace k5
