// Small dense matrix products for the attention kernels, with tiles of a few rows and sixteen columns in registers.
//
// A panel is [n][16] in float32: sixteen columns of a matrix, row by row. Everything here is static or inlined, for the
// reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

#define K5_INLINE static inline __attribute__((always_inline))

namespace k5 {

constexpr int64_t kPanel = 16;
constexpr int64_t kTileTokens = 64;

// Lanes of a vector, and rows of a tile: as many as fit in the registers. Sixteen rows divide the usual blocks and head
// dimensions, and let a tile read whole cache lines of values.
#if defined(__AVX512F__)
constexpr int64_t kVectorLanes = 16;
constexpr int kTileRows = 16;
#elif defined(__AVX2__)
constexpr int64_t kVectorLanes = 8;
constexpr int kTileRows = 6;
#else
constexpr int64_t kVectorLanes = 8;
constexpr int kTileRows = 2;
#endif
constexpr int kVectors = kPanel / kVectorLanes;

typedef float Vector __attribute__((vector_size(4 * kVectorLanes)));
typedef uint32_t UVector __attribute__((vector_size(4 * kVectorLanes)));

K5_INLINE Vector load_vector(const float* source) {
  Vector value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

K5_INLINE void store_vector(float* target, Vector value) { std::memcpy(target, &value, sizeof(value)); }

// The width rounded up to a multiple of a panel's; the added columns are zeros.
static inline int64_t padded(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

static inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

static inline int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

// Rows × 16 sums in registers.
template <int Rows>
struct Tile {
  Vector sums[Rows][kVectors];

  K5_INLINE Tile zero() {
    Tile tile;
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) tile.sums[row][part] = Vector{};
    return tile;
  }

  K5_INLINE void write(const Tile& tile, float* target, int64_t step) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++)
        store_vector(target + row * step + part * kVectorLanes, tile.sums[row][part]);
  }

  K5_INLINE void add_to(const Tile& tile, float* target, int64_t step) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) {
        float* sums = target + row * step + part * kVectorLanes;
        store_vector(sums, load_vector(sums) + tile.sums[row][part]);
      }
  }

  // target = target · factors + tile, with a factor for each column.
  K5_INLINE void multiply_and_add_to(const Vector (&factors)[kVectors], const Tile& tile, float* target, int64_t step) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) {
        float* sums = target + row * step + part * kVectorLanes;
        store_vector(sums, load_vector(sums) * factors[part] + tile.sums[row][part]);
      }
  }

  // sums[row][column] += Σ_k a[row·row_step + k·a_step] · b[k·b_step + column], in the order of k. All kernels here
  // keep this order, so that a sum has the same bits wherever it is computed. before(k) is called before the products
  // of k: other work between the products uses execution units that they leave idle.
  template <class Before>
  K5_INLINE void add_product(Tile& tile, const float* a, int64_t row_step, int64_t a_step, const float* b,
                             int64_t b_step, int64_t count, Before&& before) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < count; k++) {
      before(k);
      Vector columns[kVectors];
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) columns[part] = load_vector(b + k * b_step + part * kVectorLanes);
#pragma GCC unroll 16
      for (int row = 0; row < Rows; row++) {
        const float factor = a[row * row_step + k * a_step];
#pragma GCC unroll 2
        for (int part = 0; part < kVectors; part++) tile.sums[row][part] += factor * columns[part];
      }
    }
  }

  K5_INLINE void add_product(Tile& tile, const float* a, int64_t row_step, int64_t a_step, const float* b,
                             int64_t b_step, int64_t count) {
    add_product(tile, a, row_step, a_step, b, b_step, count, [](int64_t) {});
  }
};

// Calls body<Rows>(first row) for tiles that together have `rows` rows: full tiles first, then smaller ones.
template <class Body>
K5_INLINE void for_tiles(int64_t rows, const Body& body) {
  int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) body.template operator()<kTileRows>(row);
  if constexpr (kTileRows > 6)
    for (; row + 6 <= rows; row += 6) body.template operator()<6>(row);
  if constexpr (kTileRows > 2) {
    switch (rows - row) {
      case 5: body.template operator()<5>(row); return;
      case 4: body.template operator()<4>(row); return;
      case 3: body.template operator()<3>(row); return;
      case 2: body.template operator()<2>(row); return;
    }
  }
  if (rows - row == 1) body.template operator()<1>(row);
}

// The number of tiles of this many rows.
static inline int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// out[r][16] = rows[r] · panel: dot products of `count` rows with the sixteen columns of a panel. done(tile) is called
// for each tile of results. before: as in Tile::add_product.
template <class Done, class Before>
K5_INLINE void dot_products(const float* rows, int64_t row_step, int64_t count, const float* panel, int64_t depth,
                            float* out, int64_t out_step, const Done& done, Before&& before) {
  for_tiles(count, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    auto tile = Tile<Rows>::zero();
    Tile<Rows>::add_product(tile, rows + row * row_step, row_step, 1, panel, kPanel, depth, before);
    Tile<Rows>::write(tile, out + row * out_step, out_step);
    done(tile);
  });
}

K5_INLINE void dot_products(const float* rows, int64_t row_step, int64_t count, const float* panel, int64_t depth,
                            float* out, int64_t out_step) {
  dot_products(rows, row_step, count, panel, depth, out, out_step, [](const auto&) {}, [](int64_t) {});
}

// The larger one of each lane; `other` where either is NaN. In intrinsics because GCC compiles the plain expression to
// a comparison and a blend.
K5_INLINE Vector larger(Vector one, Vector other) {
#if defined(__AVX512F__)
  return (Vector)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
  return (Vector)_mm256_max_ps((__m256)one, (__m256)other);
#else
  return one > other ? one : other;
#endif
}

// Whether one > other in any lane.
K5_INLINE bool any_above(Vector one, Vector other) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)one, (__m512)other, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(one > other)) != 0;
#else
  bool any = false;
  for (int lane = 0; lane < kVectorLanes; lane++) any |= one[lane] > other[lane];
  return any;
#endif
}

// 2^value, accurate to about one unit in the last place for -126 <= value < 128. For smaller values the error is less
// than 2^-126, and from -127 down the result is zero; NaN for NaN. Adding 1.5 · 2^(23 - n) rounds the value to n binary
// digits after the point and leaves the digits in the lowest bits, from where they are shifted into the exponent. A
// polynomial of least relative error gives 2^rest.
K5_INLINE Vector exp2(Vector value) {
  value = larger(Vector{} - 127.0f, value);
#ifdef __AVX512F__
  // Four binary digits after the point, whose power comes from a table: a cubic is then enough, which saves products,
  // the scarce resource of these kernels. Entry i: the bits of 2^(i/16), minus what the shift leaves below the exponent
  // for i.
  const UVector table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
                       0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  const Vector magic = Vector{} + 786432.0f;
  const Vector shifted = value + magic, rest = value - (shifted - magic);
  const UVector digits = bits_as<UVector>(shifted);
  const UVector power = (digits << 19) + (UVector)_mm512_permutexvar_epi32((__m512i)digits, (__m512i)table);
  Vector polynomial = Vector{} + 0.055502135306596756f;
  polynomial = polynomial * rest + 0.24023428559303284f;
  polynomial = polynomial * rest + 0.6931471824645996f;
#else
  const Vector magic = Vector{} + 12582912.0f;
  const Vector shifted = value + magic, rest = value - (shifted - magic);
  const UVector power = (bits_as<UVector>(shifted) << 23) + 0x3f800000u;
  Vector polynomial = Vector{} + 0.001326472731307149f;
  polynomial = polynomial * rest + 0.009671512991189957f;
  polynomial = polynomial * rest + 0.05550733581185341f;
  polynomial = polynomial * rest + 0.24022242426872253f;
  polynomial = polynomial * rest + 0.6931470036506653f;
#endif
  return (polynomial * rest + 1.0f) * bits_as<Vector>(power);
}

// to[j][i] = from[i][j].
K5_INLINE void transpose_eight(const Vec8 (&from)[8], Vec8 (&to)[8]) {
  Vec8 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = K5_SHUFFLE(from[i], from[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[i + 1] = K5_SHUFFLE(from[i], from[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      quad[i + 2 * j] = K5_SHUFFLE(pair[i + j], pair[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      quad[i + 2 * j + 1] = K5_SHUFFLE(pair[i + j], pair[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; j++) {
    to[j] = K5_SHUFFLE(quad[j], quad[4 + j], 0, 1, 2, 3, 8, 9, 10, 11);
    to[4 + j] = K5_SHUFFLE(quad[j], quad[4 + j], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Transposes `count` rows of `width` elements, times a factor, into panels [panels_of(count)][padded(width)][16], with
// zeros for missing elements.
template <class T>
K5_INLINE void read_panels(const T* source, int64_t step, int64_t count, int64_t width, float factor, float* panels) {
  const int64_t padded_width = padded(width);
  for (int64_t row = 0; row < padded(count); row += kLanes)
    for (int64_t d = 0; d < padded_width; d += kLanes) {
      const int64_t rows_there = smaller(kLanes, count - row), there = smaller(kLanes, width - d);
      const T* from = source + row * step + d;
      Vec8 rows[kLanes], turned[kLanes];
      if (rows_there == kLanes && there == kLanes)
        for (int64_t i = 0; i < kLanes; i++) rows[i] = load(from + i * step) * factor;
      else
        for (int64_t i = 0; i < kLanes; i++)
          rows[i] = i < rows_there && there > 0 ? load_partial(from + i * step, there) * factor : Vec8{};
      transpose_eight(rows, turned);
      float* to = panels + (row / kPanel * padded_width + d) * kPanel + row % kPanel;
      for (int64_t i = 0; i < kLanes; i++) store(to + i * kPanel, turned[i]);
    }
}

// The inverse of read_panels, each row times its own factor. factors: [padded(count)].
template <int64_t Columns = kPanel, class T>
K5_INLINE void write_panels(const float* panels, const float* factors, int64_t count, int64_t width, T* target,
                            int64_t step) {
  const int64_t padded_width = padded(width);
  for (int64_t row = 0; row < count; row += kLanes)
    for (int64_t d = 0; d < width; d += kLanes) {
      const int64_t rows_there = smaller(kLanes, count - row), there = smaller(kLanes, width - d);
      const float* from = panels + (row / Columns * padded_width + d) * Columns + row % Columns;
      T* to = target + row * step + d;
      Vec8 columns[kLanes], rows[kLanes];
      for (int64_t i = 0; i < kLanes; i++) columns[i] = load(from + i * Columns) * load(factors + row);
      transpose_eight(columns, rows);
      if (rows_there == kLanes && there == kLanes)
        for (int64_t i = 0; i < kLanes; i++) store(to + i * step, rows[i]);
      else
#pragma GCC unroll 8  // with constant indices the rows stay in registers, here and above
        for (int64_t i = 0; i < kLanes; i++)
          if (i < rows_there) store_partial(to + i * step, rows[i], there);
    }
}

// Copies `count` rows of `width` elements, times a factor, to float32 rows of padded(width), padded with zeros.
template <class T>
K5_INLINE void read_rows(const T* source, int64_t step, int64_t count, int64_t width, float factor, float* out) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole, out_width = padded(width);
  for (int64_t row = 0; row < count; row++) {
    const T* from = source + row * step;
    float* to = out + row * out_width;
    int64_t i = 0;
    for (; i < whole; i += kLanes) store(to + i, load(from + i) * factor);
    if (rest) {
      store(to + i, load_partial(from + i, rest) * factor);
      i += kLanes;
    }
    for (; i < out_width; i += kLanes) store(to + i, Vec8{});
  }
}

// The inverse of read_rows, each row times its own factor.
template <class T>
K5_INLINE void write_rows(const float* rows, const float* factors, int64_t count, int64_t width, T* out, int64_t step) {
  const int64_t whole = width / kLanes * kLanes, rest = width - whole, in_width = padded(width);
  for (int64_t row = 0; row < count; row++) {
    const float* from = rows + row * in_width;
    T* to = out + row * step;
    const float factor = factors[row];
    for (int64_t i = 0; i < whole; i += kLanes) store(to + i, load(from + i) * factor);
    if (rest) store_partial(to + whole, load(from + whole) * factor, rest);
  }
}

}  // namespace k5
