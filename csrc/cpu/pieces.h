// Sums over the tokens of a clip, the same bits for any number of threads: the tokens are cut into pieces of a fixed
// length, a thread sums a whole piece in float32, and the sums of the pieces are added in order, in float64.
#pragma once

#include <cstdint>

#include "modulation.h"
#include "vec.h"

namespace k5 {

constexpr int64_t kPieceRows = 64;

// Rows [first_row, end_row), numbered over the whole batch, of one clip. place: of the first row.
struct Piece {
  int64_t first_row, end_row;
  Place place;
};

// Where the gradient of a modulation goes: a row of `width` for each token where the modulation has one, else a row for
// each piece, the sum over its tokens.
struct ModulationGradient {
  float* rows;
  bool per_token;
};

namespace {

// The row of the gradient that a token of a piece adds to. The first token that does so finds no value there yet.
struct GradientRow {
  float* values;
  bool first;

  template <class Lanes, class V>
  __attribute__((always_inline)) void add(int64_t i, Lanes lanes, V value) const {
    lanes.template set<false>(values + i, first ? value : lanes.get(values + i) + value);
  }
};

inline GradientRow gradient_row(const ModulationGradient& gradient, const Piece& piece, int64_t piece_number,
                                       int64_t row, int64_t width) {
  return {gradient.rows + (gradient.per_token ? row : piece_number) * width,
          gradient.per_token || row == piece.first_row};
}

}  // namespace

// The sums of pieces [pieces, width], added for each of the segments: those of segment s are [first_pieces[s],
// first_pieces[s + 1]). sums is [segments, width].
struct PieceSums {
  const float* pieces;
  const int64_t* first_pieces;
  float* sums;
  int64_t width;
};

// Columns that one call adds up.
constexpr int64_t kColumnsOfSums = 64;

static inline int64_t column_blocks(int64_t width) { return (width + kColumnsOfSums - 1) / kColumnsOfSums; }

// Blocks of columns, numbered segment * column_blocks + block.
namespace portable {
void add_pieces(const PieceSums& op, int64_t first_block, int64_t end_block);
}
namespace avx2 {
void add_pieces(const PieceSums& op, int64_t first_block, int64_t end_block);
}

}  // namespace k5
