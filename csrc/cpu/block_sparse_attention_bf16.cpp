// The forward of block-sparse attention for processors that multiply pairs of bfloat16 and add to float32
// (AVX512_BF16). As in block_sparse_attention.cpp, scores are transposed: a row for each key, queries across. All
// products have bfloat16 inputs: the weights of the softmax are rounded to bfloat16 before they are multiplied with the
// values.
//
// A pair is two consecutive terms of a sum, in the two halves of 32 bits. Queries and weights are panels of pairs,
// [n][32]. The pairs of keys are contiguous in memory; values are interleaved into pairs once for each block.
#include <immintrin.h>

#include "attention_blocks.h"

namespace k5::avx512_bf16 {
namespace {

constexpr int64_t kColumns = 2 * kVectorLanes;  // queries of a panel
constexpr int64_t kPanels = kTileTokens / kColumns, kPairs = kTileTokens / 2;
constexpr int kRows = 12;  // of a tile: with two vectors of columns they take 24 of the 32 registers

K5_INLINE __m512bh pairs(__m512i bits) { return (__m512bh)bits; }

// Calls body<Rows>(first row) until `rows` rows are done.
template <class Body>
K5_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) body.template operator()<kRows>(row);
  for (; row + 4 <= rows; row += 4) body.template operator()<4>(row);
  for (; row < rows; row++) body.template operator()<1>(row);
}

K5_INLINE int64_t row_tiles_of(int64_t rows) { return rows / kRows + rows % kRows / 4 + rows % kRows % 4; }

// sums[row][column] = Σ_p a[row·row_step + p·pair_step] · panel[p][column] over both halves of a pair, in the order of
// p. Prefetches in between.
template <int Rows>
K5_INLINE void multiply(const uint32_t* a, int64_t row_step, int64_t pair_step, const uint32_t* panel, int64_t count,
                        __m512 (&sums)[Rows][2], Prefetch& prefetch) {
#pragma GCC unroll 12
  for (int row = 0; row < Rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int64_t p = 0; p < count; p++) {
    prefetch(p);
    const __m512i left = _mm512_load_si512(panel + p * kColumns);
    const __m512i right = _mm512_load_si512(panel + p * kColumns + kVectorLanes);
#pragma GCC unroll 12
    for (int row = 0; row < Rows; row++) {
      uint32_t pair;
      std::memcpy(&pair, a + row * row_step + p * pair_step, sizeof(pair));  // two elements need no alignment
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(pair));
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], pairs(factor), pairs(left));
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], pairs(factor), pairs(right));
    }
  }
}

// The rows with zeros up to padded(width): the rows themselves where they are so, else a copy in scratch.
K5_INLINE const BFloat16* dense_rows(const BFloat16* source, int64_t step, int64_t count, int64_t width,
                                     BFloat16* scratch) {
  const int64_t padded_width = padded(width);
  if (step == width && width == padded_width) return source;
  for (int64_t row = 0; row < count; row++) {
    std::memcpy(scratch + row * padded_width, source + row * step, width * sizeof(BFloat16));
    std::memset(scratch + row * padded_width + width, 0, (padded_width - width) * sizeof(BFloat16));
  }
  return scratch;
}

// Packs `count` queries into panels; the other columns are zeros. rows: scratch for [64][padded(width)].
K5_INLINE void pack_queries(const BFloat16* source, int64_t step, int64_t count, int64_t width, BFloat16* rows,
                            uint32_t* panels) {
  const int64_t padded_width = padded(width), depth = padded_width / 2;
  std::memset(rows, 0, kTileTokens * padded_width * sizeof(BFloat16));
  for (int64_t row = 0; row < count; row++)
    std::memcpy(rows + row * padded_width, source + row * step, width * sizeof(BFloat16));
  // Only bits are moved, so a pair can be transposed as a float.
  for (int64_t query = 0; query < kTileTokens; query += kLanes)
    for (int64_t p = 0; p < depth; p += kLanes) {
      const BFloat16* from = rows + query * padded_width + 2 * p;
      uint32_t* to = panels + (query / kColumns * depth + p) * kColumns + query % kColumns;
      Vec8 pairs_of[kLanes], turned[kLanes];
      for (int64_t i = 0; i < kLanes; i++) std::memcpy(&pairs_of[i], from + i * padded_width, sizeof(Vec8));
      transpose_eight(pairs_of, turned);
      for (int64_t i = 0; i < kLanes; i++) std::memcpy(to + i * kColumns, &turned[i], sizeof(Vec8));
    }
}

// Interleaves the values of tokens 2p and 2p + 1: [(count + 1) / 2][width] pairs; zeros for a missing last token.
K5_INLINE void pair_values(const BFloat16* rows, int64_t width, int64_t count, uint32_t* out) {
  for (int64_t token = 0; token < count; token += 2)
    for (int64_t d = 0; d < width; d += kVectorLanes) {
      const BFloat16* at = rows + token * width + d;
      const auto widened = [](const BFloat16* from) __attribute__((always_inline)) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      };
      const __m512i second = token + 1 < count ? widened(at + width) : _mm512_setzero_si512();
      _mm512_store_si512(out + token / 2 * width + d, _mm512_or_si512(widened(at), _mm512_slli_epi32(second, 16)));
    }
}

// Interleaves two vectors of weights, rounded to bfloat16, into pairs.
K5_INLINE __m512i pair_weights(__m512 first, __m512 second) {
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

struct PanelBuffers {
  uint32_t *queries, *values, *weights;  // [panels][width / 2][32], [32][width], [32][32]
  float *scores, *out, *top, *total;     // [64][32], [panels][width][32], [64], [64]
  BFloat16* rows;                        // [2][64][width]
};

// As `attend` in block_sparse_attention.cpp, for one panel of queries. scale: of the scores, times log2(e).
template <int64_t kWidth>
__attribute__((noinline)) void attend(const BFloat16* keys, int64_t any_count, int64_t any_width, float scale,
                                      const PanelBuffers& buffers, int64_t panel, Prefetch& prefetch) {
  const int64_t width = kWidth ? kWidth : any_width, count = kWidth ? kTileTokens : any_count;
  float* scores = buffers.scores;
  float* top = buffers.top + panel * kColumns;
  float* total = buffers.total + panel * kColumns;
  __m512 highest[2], base[2], decay[2], sums[2];
  for (int half = 0; half < 2; half++) highest[half] = _mm512_set1_ps(-kInfinity);
  for_row_tiles(count, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    __m512 tile[Rows][2];
    multiply<Rows>(reinterpret_cast<const uint32_t*>(keys + row * width), width / 2, 1,
                   buffers.queries + panel * width / 2 * kColumns, width / 2, tile, prefetch);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const __m512 scaled = _mm512_mul_ps(tile[r][half], _mm512_set1_ps(scale));
        highest[half] = _mm512_max_ps(scaled, highest[half]);
        _mm512_store_ps(scores + (row + r) * kColumns + half * kVectorLanes, scaled);
      }
  });
  if (count % 2)
    for (int64_t i = 0; i < kColumns; i++) scores[count * kColumns + i] = -kInfinity;
  for (int half = 0; half < 2; half++) {
    const __m512 before = _mm512_load_ps(top + half * kVectorLanes);
    highest[half] = _mm512_max_ps(highest[half], before);
    const __mmask16 none = _mm512_cmp_ps_mask(highest[half], _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    base[half] = _mm512_mask_blend_ps(none, highest[half], _mm512_setzero_ps());  // a score of -inf then weighs 0
    decay[half] = exp2(_mm512_sub_ps(before, base[half]));
    _mm512_store_ps(top + half * kVectorLanes, highest[half]);
    sums[half] = _mm512_setzero_ps();
  }
  for (int64_t key = 0; key < count; key += 2)
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const float* score = scores + key * kColumns + half * kVectorLanes;
      const __m512 first = exp2(_mm512_sub_ps(_mm512_load_ps(score), base[half]));
      const __m512 second = exp2(_mm512_sub_ps(_mm512_load_ps(score + kColumns), base[half]));
      sums[half] = _mm512_add_ps(sums[half], _mm512_add_ps(first, second));
      _mm512_store_si512(buffers.weights + key / 2 * kColumns + half * kVectorLanes, pair_weights(first, second));
    }
  for (int half = 0; half < 2; half++) {
    float* gathered = total + half * kVectorLanes;
    _mm512_store_ps(gathered, _mm512_fmadd_ps(_mm512_load_ps(gathered), decay[half], sums[half]));
  }
  float* out = buffers.out + panel * width * kColumns;
  for_row_tiles(width, [&]<int Rows>(int64_t d) __attribute__((always_inline)) {
    __m512 tile[Rows][2];
    multiply<Rows>(buffers.values + d, 1, width, buffers.weights, (count + 1) / 2, tile, prefetch);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        float* gathered = out + (d + r) * kColumns + half * kVectorLanes;
        _mm512_store_ps(gathered, _mm512_fmadd_ps(_mm512_load_ps(gathered), decay[half], tile[r][half]));
      }
  });
}

PanelBuffers place_buffers(float* memory, int64_t width) {
  const auto take = [&](int64_t floats) {
    float* taken = memory;
    memory += floats;
    return taken;
  };
  const auto take_pairs = [&](int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); };
  PanelBuffers buffers;
  buffers.queries = take_pairs(kTileTokens * width / 2);
  buffers.values = take_pairs(kPairs * width);
  buffers.weights = take_pairs(kPairs * kColumns);
  buffers.scores = take(kTileTokens * kColumns);
  buffers.out = take(kTileTokens * width);
  buffers.top = take(kTileTokens);
  buffers.total = take(kTileTokens);
  buffers.rows = reinterpret_cast<BFloat16*>(take(kTileTokens * width));
  return buffers;
}

}  // namespace

void block_sparse_attention(const Attention<BFloat16>& op, int64_t item, float* memory) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t width = sizes.width, padded_width = padded(width);
  const BFloat16* q = head_of(op.q, at);
  const BFloat16* k = head_of(op.k, at);
  const BFloat16* v = head_of(op.v, at);
  const PanelBuffers buffers = place_buffers(memory, padded_width);
  const int64_t* offsets = offsets_of(op.reads, at) + at.block;
  Prefetch prefetch;
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    const int64_t panels = (rows + kColumns - 1) / kColumns;
    pack_queries(q + first * op.q.step, op.q.step, rows, width, buffers.rows, buffers.queries);
    fill(buffers.out, panels * kColumns * padded_width, 0.0f);
    fill(buffers.top, kTileTokens, -kInfinity);
    fill(buffers.total, kTileTokens, 0.0f);
    for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) {
      fetch_next(prefetch, op, at, entry);
      const int64_t products = row_tiles_of(kTileTokens) * padded_width / 2 + row_tiles_of(padded_width) * kPairs;
      prefetch.spread_over(panels * products / Prefetch::kSteps);
      for_parts(sizes, op.reads.indices[entry], [&](int64_t token, int64_t count) {
        const BFloat16* keys = dense_rows(k + token * op.k.step, op.k.step, count, width, buffers.rows);
        const BFloat16* values = dense_rows(v + token * op.v.step, op.v.step, count, width,
                                            buffers.rows + kTileTokens * padded_width);
        pair_values(values, padded_width, count, buffers.values);
        for_width(count == kTileTokens, padded_width, [&]<int64_t kWidth>() {
          for (int64_t panel = 0; panel < panels; panel++)
            attend<kWidth>(keys, count, padded_width, sizes.scale * kLog2E, buffers, panel, prefetch);
        });
      });
    }
    float* lse = head_of(op.lse, at) + first;
    finish_rows(buffers.top, buffers.total, rows, offsets[0] == offsets[1], lse);
    write_panels<kColumns>(buffers.out, buffers.total, rows, width, head_of(op.out, at) + first * op.out.step,
                           op.out.step);
  });
}

}  // namespace k5::avx512_bf16
