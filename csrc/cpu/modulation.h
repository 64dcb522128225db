// Shift, scale and gate of adaLN: which row of a modulation belongs to which token (k5kernels/ops/modulation.py).
#pragma once

#include <cstdint>

namespace k5 {

// The tokens of a batch of sequences; every sequence holds the same clips. clip_starts [clips + 1]: the token each clip
// starts at, then the number of tokens.
struct Sequences {
  const int64_t* clip_starts;
  int64_t tokens;
};

// float32 rows with unit stride along the width. A row serves a whole clip where token_stride is zero, and one token
// where clip_stride is zero.
struct Modulation {
  const float* rows;
  int64_t sample_stride, clip_stride, token_stride;
};

// One token of a batch and the clip it belongs to.
struct Place {
  int64_t sample, clip, token;
};

// Of the token numbered `row` over the whole batch.
static inline Place place_of(const Sequences& sequences, int64_t row) {
  Place place{row / sequences.tokens, 0, row % sequences.tokens};
  while (sequences.clip_starts[place.clip + 1] <= place.token) place.clip++;
  return place;
}

static inline Place next(const Sequences& sequences, Place place) {
  if (++place.token == sequences.tokens) return {place.sample + 1, 0, 0};
  if (place.token == sequences.clip_starts[place.clip + 1]) place.clip++;
  return place;
}

static inline const float* row_at(const Modulation& modulation, const Place& place) {
  return modulation.rows + place.sample * modulation.sample_stride + place.clip * modulation.clip_stride +
         place.token * modulation.token_stride;
}

}  // namespace k5
