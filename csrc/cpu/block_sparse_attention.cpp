// Scores stand transposed: keys down, sixteen queries across. Keys and values are then read as they lie in memory, one
// number at a time against a panel of queries, and the softmax runs down columns without a horizontal sum.
#include "block_sparse_attention.h"

#include "attention_blocks.h"

namespace k5::K5_ISA {
namespace {

// for_parts of attention_blocks.h over all blocks of a list.
template <class Body>
K5_INLINE void for_listed_parts(const AttentionSizes& sizes, const BlockLists& lists, const Place& at,
                                const Body& body) {
  const int64_t* offsets = offsets_of(lists, at) + at.block;
  for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) for_parts(sizes, lists.indices[entry], body);
}

// Rows as float32 with zeros up to padded(width): where they stand, or copied.
template <class T>
K5_INLINE const float* dense_rows(const T* source, int64_t step, int64_t count, int64_t width, float* scratch) {
  if constexpr (sizeof(T) == sizeof(float))
    if (step == width && width == padded(width)) return source;
  read_rows(source, step, count, width, 1.0f, scratch);
  return scratch;
}

// Panels with `count` columns; columns behind them are zeros.
template <class T>
K5_INLINE void read_panels(const T* source, int64_t step, int64_t count, int64_t width, float factor, float* rows,
                           float* panels) {
  const int64_t wide = padded(width), columns = panels_of(count) * kPanel;
  read_rows(source, step, count, width, factor, rows);
  for (int64_t i = count * wide; i < columns * wide; i += kLanes) store(rows + i, Vec8{});
  rows_to_panels(rows, wide, panels_of(count), panels);
}

// panel[d][16] = panel[d][16] · decay + Σ_r rows[r][d] · weights[r][16]. The sum is complete before it is added: small
// terms added one by one to what many blocks have gathered would round away.
template <bool kDecays, class Done>
K5_INLINE void add_weighted_rows(const float* rows, int64_t count, int64_t width, const float* weights,
                                 const Wide (&decay)[kVectors], float* panel, const Done& done) {
  for_tiles(width, [&]<int Rows>(int64_t d) __attribute__((always_inline)) {
    auto tile = Tile<Rows>::zero();
    Tile<Rows>::add_product(tile, rows + d, 1, width, weights, kPanel, count);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) {
        float* sums = panel + (d + row) * kPanel + part * kWide;
        const Wide before = load_wide(sums);
        store_wide(sums, (kDecays ? before * decay[part] : before) + tile.sums[row][part]);
      }
    done();
  });
}

K5_INLINE void add_weighted_rows(const float* rows, int64_t count, int64_t width, const float* weights, float* panel) {
  add_weighted_rows<false>(rows, count, width, weights, {}, panel, [] {});
}

// One panel of queries and up to 64 keys: scores, online softmax, values. top and total: [16], the largest score yet
// and the sum of 2^(score - top). kWidth: the width of a whole block of 64 keys, or 0 for any width and count.
template <int64_t kWidth>
__attribute__((noinline)) void attend(const float* keys, const float* values, int64_t any_count, int64_t any_width,
                                      const float* queries, float* scores, float* out, float* top, float* total,
                                      Prefetch& prefetch) {
  const int64_t width = kWidth ? kWidth : any_width, count = kWidth ? kTileTokens : any_count;
  Wide highest[kVectors], base[kVectors], decay[kVectors];
  for (int part = 0; part < kVectors; part++) highest[part] = load_wide(top + part * kWide);
  dot_products(keys, width, count, queries, width, scores, kPanel, [&]<int Rows>(const Tile<Rows>& tile)
                   __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
      for (int part = 0; part < kVectors; part++) highest[part] = larger(tile.sums[row][part], highest[part]);
    prefetch.next_rows();
  });
  for (int part = 0; part < kVectors; part++) {
    base[part] = highest[part] == -kInfinity ? Wide{} : highest[part];  // so that scores of -inf weigh nothing
    decay[part] = exp2(load_wide(top + part * kWide) - base[part]);
    store_wide(top + part * kWide, highest[part]);
  }
  Wide sums[kVectors] = {};
  for (int64_t key = 0; key < count; key++)
    for (int part = 0; part < kVectors; part++) {
      float* score = scores + key * kPanel + part * kWide;
      const Wide weight = exp2(load_wide(score) - base[part]);
      sums[part] += weight;
      store_wide(score, weight);
    }
  for (int part = 0; part < kVectors; part++) {
    float* gathered = total + part * kWide;
    store_wide(gathered, load_wide(gathered) * decay[part] + sums[part]);
  }
  add_weighted_rows<true>(values, count, width, scores, decay, out, [&] { prefetch.next_rows(); });
}

// Scratch of one block of keys: what stays while its readers pass.
struct KeyBlock {
  const float *key_rows;  // [64][width]
  float *keys, *values;   // panels
  float *grad_keys, *grad_values;
};

// One part of the queries that read a block of keys: its share of all three gradients. queries: scaled as in the
// forward, so that scores have the bits from which lse was made and probabilities add up to one. grad_q: rows, or null.
void add_gradients(const KeyBlock& block, int64_t keys, const float* queries, const float* grads, int64_t count,
                   int64_t width, const float* base, const float* shift, float* weights,
                   float* slopes, float* grad_q) {
  const int64_t panels = panels_of(keys);
  for (int64_t panel = 0; panel < panels; panel++) {
    const int64_t at = panel * width * kPanel;
    float* slope = slopes + panel * kTileTokens * kPanel;
    dot_products(queries, width, count, block.keys + at, width, weights, kPanel);
    for (int64_t row = 0; row < count; row++)
      for (int part = 0; part < kVectors; part++) {
        float* weight = weights + row * kPanel + part * kWide;
        store_wide(weight, exp2(load_wide(weight) - base[row]));
      }
    add_weighted_rows(grads, count, width, weights, block.grad_values + at);
    dot_products(grads, width, count, block.values + at, width, slope, kPanel);
    for (int64_t row = 0; row < count; row++)
      for (int part = 0; part < kVectors; part++) {
        const int64_t i = row * kPanel + part * kWide;
        store_wide(slope + i, load_wide(weights + i) * (load_wide(slope + i) - shift[row]));
      }
    add_weighted_rows(queries, count, width, slope, block.grad_keys + at);
  }
  if (!grad_q) return;
  for (int64_t d = 0; d < width; d += kPanel)
    for_tiles(count, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
      auto tile = Tile<Rows>::zero();
      for (int64_t panel = 0; panel < panels; panel++)
        Tile<Rows>::add_product(tile, slopes + (panel * kTileTokens + row) * kPanel, kPanel, 1,
                                block.key_rows + panel * kPanel * width + d, width,
                                smaller(kPanel, keys - panel * kPanel));
      Tile<Rows>::add_to(tile, grad_q + row * width + d, width);
    });
}

// Gradients of k and v of a block, written; grad_q: float32 rows of the whole head, added to, or null.
template <class T>
void gradients_of_keys(const AttentionBackward<T>& op, const Place& at, float* scratch, float* grad_q) {
  const AttentionSizes& sizes = op.sizes;
  const int64_t width = sizes.width, wide = padded(width), block_floats = kTileTokens * wide;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  const T* grad_out = head_of(op.grad_out, at);
  const float* base = head_of(op.base, at);
  const float* shift = head_of(op.shift, at);
  float* key_rows = scratch;
  float* other_rows = key_rows + block_floats;
  float* query_rows = other_rows + block_floats;
  float* grad_rows = query_rows + block_floats;
  KeyBlock block;
  block.keys = grad_rows + block_floats;
  block.values = block.keys + block_floats;
  block.grad_keys = block.values + block_floats;
  block.grad_values = block.grad_keys + block_floats;
  float* weights = block.grad_values + block_floats;
  float* slopes = weights + kTileTokens * kPanel;
  float* factors = slopes + kTileTokens * kTileTokens;
  for_parts(sizes, at.block, [&](int64_t first, int64_t keys) {
    read_panels(v + first * op.v.step, op.v.step, keys, width, 1.0f, other_rows, block.values);
    read_panels(k + first * op.k.step, op.k.step, keys, width, 1.0f, key_rows, block.keys);
    block.key_rows = key_rows;
    fill(block.grad_keys, 2 * block_floats, 0.0f);
    for_listed_parts(sizes, op.readers, at, [&](int64_t token, int64_t count) {
      read_rows(q + token * op.q.step, op.q.step, count, width, sizes.scale * kLog2E, query_rows);
      const float* grads = dense_rows(grad_out + token * op.grad_out.step, op.grad_out.step, count, width, grad_rows);
      add_gradients(block, keys, query_rows, grads, count, wide, base + token, shift + token, weights, slopes,
                     grad_q ? grad_q + token * wide : nullptr);
    });
    fill(factors, keys, kLn2);  // scale, and the scaling of queries undone
    panels_to_rows(block.grad_keys, wide, panels_of(keys), other_rows);
    write_rows(other_rows, factors, keys, width, head_of(op.grad_k, at) + first * op.grad_k.step,
               op.grad_k.step);
    fill(factors, keys, 1.0f);
    panels_to_rows(block.grad_values, wide, panels_of(keys), other_rows);
    write_rows(other_rows, factors, keys, width, head_of(op.grad_v, at) + first * op.grad_v.step,
               op.grad_v.step);
  });
}

// One panel of queries and up to 64 keys: their share of the gradient of q, panels.
void add_query_gradient(const float* keys, const float* values, int64_t count, int64_t width, const float* queries,
                        const float* grads, const float* base, const float* shift, float* weights,
                        float* slopes, float* grad_q) {
  dot_products(keys, width, count, queries, width, weights, kPanel);
  dot_products(values, width, count, grads, width, slopes, kPanel);
  for (int64_t key = 0; key < count; key++)
    for (int part = 0; part < kVectors; part++) {
      const int64_t i = key * kPanel + part * kWide;
      const Wide weight = exp2(load_wide(weights + i) - load_wide(base + part * kWide));
      store_wide(slopes + i, weight * (load_wide(slopes + i) - load_wide(shift + part * kWide)));
    }
  add_weighted_rows(keys, count, width, slopes, grad_q);
}

}  // namespace

template <class T>
void block_sparse_attention(const Attention<T>& op, int64_t item, float* scratch) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t width = sizes.width, wide = padded(width), block_floats = kTileTokens * wide;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  float* queries = scratch;
  float* out = queries + block_floats;
  float* key_rows = out + block_floats;
  float* value_rows = key_rows + block_floats;
  float* scores = value_rows + block_floats;
  float* top = scores + kTileTokens * kPanel;
  float* total = top + kTileTokens;
  const int64_t* offsets = offsets_of(op.reads, at) + at.block;
  Prefetch prefetch;
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    const int64_t panels = panels_of(rows);
    read_panels(q + first * op.q.step, op.q.step, rows, width, sizes.scale * kLog2E, key_rows, queries);
    fill(out, panels * kPanel * wide, 0.0f);
    fill(top, kTileTokens, -kInfinity);
    fill(total, kTileTokens, 0.0f);
    for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) {
      prefetch.clear();
      prefetch_next(op, at, entry, prefetch);
      for_parts(sizes, op.reads.indices[entry], [&](int64_t token, int64_t count) {
        const float* keys = dense_rows(k + token * op.k.step, op.k.step, count, width, key_rows);
        const float* values = dense_rows(v + token * op.v.step, op.v.step, count, width, value_rows);
        const auto attend_panels = [&]<int64_t kWidth>() {
          for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t from = panel * kPanel;
            attend<kWidth>(keys, values, count, wide, queries + from * wide, scores, out + from * wide, top + from,
                           total + from, prefetch);
          }
        };
        if (count == kTileTokens && wide == 64) attend_panels.template operator()<64>();
        else if (count == kTileTokens && wide == 128) attend_panels.template operator()<128>();
        else attend_panels.template operator()<0>();
      });
    }
    finish_rows(top, total, rows, offsets[0] == offsets[1], head_of(op.lse, at) + first);
    panels_to_rows(out, wide, panels, key_rows);
    write_rows(key_rows, total, rows, width, head_of(op.out, at) + first * op.out.step, op.out.step);
  });
}

template <class T>
void prepare_attention_backward(const AttentionSaved<T>& op, int64_t first, int64_t end) {
  const AttentionSizes& sizes = op.sizes;
  const int64_t tokens = sizes.block_starts[sizes.blocks];
  const int64_t whole = sizes.width / kLanes * kLanes, rest = sizes.width - whole;
  for (int64_t row = first; row < end; row++) {
    const int64_t token = row % tokens;
    const Place at{row / tokens / sizes.heads, row / tokens % sizes.heads, 0};
    const T* grads = head_of(op.grad_out, at) + token * op.grad_out.step;
    const T* outs = head_of(op.out, at) + token * op.out.step;
    Vec8 products = {};
    for (int64_t i = 0; i < whole; i += kLanes) products += load(grads + i) * load(outs + i);
    if (rest) products += load_partial(grads + whole, rest) * load_partial(outs + whole, rest);
    op.shift[row] = sum(products);
    if (op.grad_lse.data) op.shift[row] -= head_of(op.grad_lse, at)[token * op.grad_lse.step];
    op.base[row] = op.lse[row] * kLog2E;
  }
}

template <class T>
void head_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch, float* grad_q_scratch) {
  const AttentionSizes& sizes = op.sizes;
  const int64_t tokens = sizes.block_starts[sizes.blocks], wide = padded(sizes.width);
  Place at{item / sizes.heads, item % sizes.heads, 0};
  fill(grad_q_scratch, tokens * wide, 0.0f);
  for (; at.block < sizes.blocks; at.block++) gradients_of_keys(op, at, scratch, grad_q_scratch);
  float* factors = scratch;
  fill(factors, kTileTokens, sizes.scale);
  T* grad_q = head_of(op.grad_q, at);
  for (int64_t token = 0; token < tokens; token += kTileTokens)
    write_rows(grad_q_scratch + token * wide, factors, smaller(kTileTokens, tokens - token), sizes.width,
               grad_q + token * op.grad_q.step, op.grad_q.step);
}

template <class T>
void key_block_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch) {
  gradients_of_keys(op, place_of(op.sizes, item), scratch, nullptr);
}

template <class T>
void query_block_gradient(const AttentionBackward<T>& op, int64_t item, float* scratch) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t width = sizes.width, wide = padded(width), block_floats = kTileTokens * wide;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  const T* grad_out = head_of(op.grad_out, at);
  float* key_rows = scratch;
  float* value_rows = key_rows + block_floats;
  float* queries = value_rows + block_floats;
  float* grads = queries + block_floats;
  float* grad_q = grads + block_floats;
  float* weights = grad_q + block_floats;
  float* slopes = weights + kTileTokens * kPanel;
  float* base = slopes + kTileTokens * kPanel;
  float* shift = base + kTileTokens;
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    read_panels(q + first * op.q.step, op.q.step, rows, width, sizes.scale * kLog2E, key_rows, queries);
    read_panels(grad_out + first * op.grad_out.step, op.grad_out.step, rows, width, 1.0f, key_rows, grads);
    fill(grad_q, block_floats, 0.0f);
    fill(base, 2 * kTileTokens, 0.0f);
    for (int64_t row = 0; row < rows; row++) {
      base[row] = head_of(op.base, at)[first + row];
      shift[row] = head_of(op.shift, at)[first + row];
    }
    for_listed_parts(sizes, op.reads, at, [&](int64_t token, int64_t count) {
      const float* keys = dense_rows(k + token * op.k.step, op.k.step, count, width, key_rows);
      const float* values = dense_rows(v + token * op.v.step, op.v.step, count, width, value_rows);
      for (int64_t from = 0; from < rows; from += kPanel)
        add_query_gradient(keys, values, count, wide, queries + from * wide, grads + from * wide, base + from,
                           shift + from, weights, slopes, grad_q + from * wide);
    });
    panels_to_rows(grad_q, wide, panels_of(rows), key_rows);
    float* factors = base;
    fill(factors, kTileTokens, sizes.scale);
    write_rows(key_rows, factors, rows, width, head_of(op.grad_q, at) + first * op.grad_q.step,
               op.grad_q.step);
  });
}

#define K5_INSTANTIATE(T)                                                                                         \
  template void block_sparse_attention(const Attention<T>&, int64_t, float*);                                     \
  template void prepare_attention_backward(const AttentionSaved<T>&, int64_t, int64_t);                           \
  template void head_gradients(const AttentionBackward<T>&, int64_t, float*, float*);                             \
  template void key_block_gradients(const AttentionBackward<T>&, int64_t, float*);                                \
  template void query_block_gradient(const AttentionBackward<T>&, int64_t, float*);
K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)
#undef K5_INSTANTIATE

}  // namespace k5::K5_ISA
