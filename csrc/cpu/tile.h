// Small dense products for the attention kernels: sixteen columns and some rows at a time in registers.
//
// A panel is [n][16] in float32, its second index the sixteen columns. Everything here is static or inlined, for the
// reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

#define K5_INLINE static inline __attribute__((always_inline))

namespace k5 {

constexpr int64_t kPanel = 16;
constexpr int64_t kTileTokens = 64;

// Lanes of a vector of columns, and rows of a tile: as many as the registers hold; sixteen divide blocks and heads, and
// make a tile read whole cache lines of values.
#if defined(__AVX512F__)
constexpr int64_t kWide = 16;
constexpr int kTileRows = 16;
#elif defined(__AVX2__)
constexpr int64_t kWide = 8;
constexpr int kTileRows = 6;
#else
constexpr int64_t kWide = 8;
constexpr int kTileRows = 2;
#endif
constexpr int kVectors = kPanel / kWide;

typedef float Wide __attribute__((vector_size(4 * kWide)));
typedef uint32_t UWide __attribute__((vector_size(4 * kWide)));

K5_INLINE Wide load_wide(const float* source) {
  Wide value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

K5_INLINE void store_wide(float* target, Wide value) { std::memcpy(target, &value, sizeof(value)); }

// A width that panels divide; what it adds is kept at zero.
static inline int64_t padded(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

static inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

static inline int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

// Rows × 16 sums held in registers.
template <int Rows>
struct Tile {
  Wide sums[Rows][kVectors];

  K5_INLINE Tile zero() {
    Tile tile;
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) tile.sums[row][part] = Wide{};
    return tile;
  }

  K5_INLINE void write(const Tile& tile, float* target, int64_t step) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++)
        store_wide(target + row * step + part * kWide, tile.sums[row][part]);
  }

  K5_INLINE void add_to(const Tile& tile, float* target, int64_t step) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) {
        float* sums = target + row * step + part * kWide;
        store_wide(sums, load_wide(sums) + tile.sums[row][part]);
      }
  }

  // sums[row][column] += Σ_k a[row·row_step + k·a_step] · b[k·b_step + column], k upwards: the order every kernel
  // here keeps, so that one sum has the same bits wherever it is formed.
  K5_INLINE void add_product(Tile& tile, const float* a, int64_t row_step, int64_t a_step, const float* b,
                             int64_t b_step, int64_t count) {
#pragma GCC unroll 8
    for (int64_t k = 0; k < count; k++) {
      Wide columns[kVectors];
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) columns[part] = load_wide(b + k * b_step + part * kWide);
#pragma GCC unroll 16
      for (int row = 0; row < Rows; row++) {
        const float factor = a[row * row_step + k * a_step];
#pragma GCC unroll 2
        for (int part = 0; part < kVectors; part++) tile.sums[row][part] += factor * columns[part];
      }
    }
  }
};

// Calls body<Rows>(first row) until `rows` rows are done, with full tiles and few for the rest.
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

// out[r][16] = rows[r] · panel: dot products of `count` rows with the sixteen columns of a panel. done(tile) is called
// with each tile of them.
template <class Done>
K5_INLINE void dot_products(const float* rows, int64_t row_step, int64_t count, const float* panel, int64_t depth,
                            float* out, int64_t out_step, const Done& done) {
  for_tiles(count, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
    auto tile = Tile<Rows>::zero();
    Tile<Rows>::add_product(tile, rows + row * row_step, row_step, 1, panel, kPanel, depth);
    Tile<Rows>::write(tile, out + row * out_step, out_step);
    done(tile);
  });
}

K5_INLINE void dot_products(const float* rows, int64_t row_step, int64_t count, const float* panel, int64_t depth,
                            float* out, int64_t out_step) {
  dot_products(rows, row_step, count, panel, depth, out, out_step, [](const auto&) {});
}

// The larger one; `other` where either is NaN. Spelled out because GCC makes a comparison and a blend of it.
K5_INLINE Wide larger(Wide one, Wide other) {
#if defined(__AVX512F__)
  return (Wide)_mm512_max_ps((__m512)one, (__m512)other);
#elif defined(__AVX2__)
  return (Wide)_mm256_max_ps((__m256)one, (__m256)other);
#else
  return one > other ? one : other;
#endif
}

// 2^value to about one unit in the last place for value < 128; zero below 2^-126.5, NaN for NaN.
K5_INLINE Wide exp2(Wide value) {
  value = larger(Wide{} - 127.0f, value);  // whose power below is zero
  const Wide magic = Wide{} + 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  const Wide shifted = value + magic;
  const Wide rest = value - (shifted - magic);
  Wide polynomial = Wide{} + 0.001326472731307149f;  // least relative error over ±1/2
  polynomial = polynomial * rest + 0.009671512991189957f;
  polynomial = polynomial * rest + 0.05550733581185341f;
  polynomial = polynomial * rest + 0.24022242426872253f;
  polynomial = polynomial * rest + 0.6931470036506653f;
  polynomial = polynomial * rest + 1.0f;
  UWide bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + 0x3f800000u;
  Wide power;
  std::memcpy(&power, &bits, sizeof(power));
  return polynomial * power;
}

#ifdef __clang__
#define K5_SHUFFLE(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define K5_SHUFFLE(one, other, ...) __builtin_shuffle(one, other, UVec8{__VA_ARGS__})
#endif

// target[j][i] = source[i][j], eight by eight.
K5_INLINE void transpose_eight(const float* source, int64_t source_step, float* target, int64_t target_step) {
  Vec8 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; i++) row[i] = load(source + i * source_step);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = K5_SHUFFLE(row[i], row[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pair[i + 1] = K5_SHUFFLE(row[i], row[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      quad[i + 2 * j] = K5_SHUFFLE(pair[i + j], pair[i + 2 + j], 0, 1, 8, 9, 4, 5, 12, 13);
      quad[i + 2 * j + 1] = K5_SHUFFLE(pair[i + j], pair[i + 2 + j], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int j = 0; j < 4; j++) {
    store(target + j * target_step, K5_SHUFFLE(quad[j], quad[4 + j], 0, 1, 2, 3, 8, 9, 10, 11));
    store(target + (4 + j) * target_step, K5_SHUFFLE(quad[j], quad[4 + j], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

// Rows [kTileTokens][width] to panels [kTileTokens / 16][width][16]; width a multiple of 16.
K5_INLINE void rows_to_panels(const float* rows, int64_t width, int64_t panels, float* out) {
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t half = 0; half < kPanel; half += kLanes)
      for (int64_t d = 0; d < width; d += kLanes)
        transpose_eight(rows + (panel * kPanel + half) * width + d, width, out + (panel * width + d) * kPanel + half,
                        kPanel);
}

// The inverse.
K5_INLINE void panels_to_rows(const float* panels_in, int64_t width, int64_t panels, float* rows) {
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t half = 0; half < kPanel; half += kLanes)
      for (int64_t d = 0; d < width; d += kLanes)
        transpose_eight(panels_in + (panel * width + d) * kPanel + half, kPanel,
                        rows + (panel * kPanel + half) * width + d, width);
}

// `count` rows of `width` elements, times a factor, into float32 rows of padded(width), zeros behind them.
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

// The inverse, each row times its factor.
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
