// Scores are transposed: a row for each key, sixteen queries across. Keys and values are then read in the order of
// memory, each number multiplied with a panel of queries, and the softmax runs down columns: no sum over the lanes of a
// vector.
#include "block_sparse_attention.h"

#include "attention_blocks.h"

namespace k5::K5_ISA {
namespace {

// The rows as float32 with zeros up to padded(width): the rows themselves where they are so, else a copy in scratch.
template <class T>
K5_INLINE const float* dense_rows(const T* source, int64_t step, int64_t count, int64_t width, float* scratch) {
  if constexpr (sizeof(T) == sizeof(float))
    if (step == width && width == padded(width)) return source;
  read_rows(source, step, count, width, 1.0f, scratch);
  return scratch;
}

// Weights that are computed before the first row is added; all of them where there are few registers.
constexpr int64_t kWeightsAhead = kVectorLanes > kLanes ? 4 : kTileTokens;

// Calls add(tile, d) with Σ_r rows[r][d] · weights[r][16] for each tile of d. The sum over a block is completed before
// it is added to the sum over all blocks: small terms added one by one to a large sum would be rounded away. weigh(r)
// computes the weights of row r; it is called between the products of the first tile, because exp2 is a long chain of
// dependent operations and the products fill the gaps.
template <class Weigh, class Add>
K5_INLINE void sum_weighed_rows(const float* rows, int64_t count, int64_t width, const float* weights,
                                Prefetch& prefetch, const Weigh& weigh, const Add& add) {
  const int64_t ahead = smaller(kWeightsAhead, count), rest = count - ahead;
  for (int64_t row = 0; row < ahead; row++) weigh(row);
  for_tiles(width, [&]<int Rows>(int64_t d) __attribute__((always_inline)) {
    auto tile = Tile<Rows>::zero();
    if (d == 0) {
      Tile<Rows>::add_product(tile, rows, 1, width, weights, kPanel, rest,
                              [&](int64_t row) __attribute__((always_inline)) { weigh(row + ahead); });
      Tile<Rows>::add_product(tile, rows + rest * width, 1, width, weights + rest * kPanel, kPanel, ahead);
    } else {
      Tile<Rows>::add_product(tile, rows + d, 1, width, weights, kPanel, count, prefetch);
    }
    add(tile, d);
  });
}

// An `add` for sum_weighed_rows.
K5_INLINE auto adding_to(float* panel) {
  return [panel]<int Rows>(const Tile<Rows>& tile, int64_t d) __attribute__((always_inline)) {
    Tile<Rows>::add_to(tile, panel + d * kPanel, kPanel);
  };
}

// The number of calls of Prefetch::next_lines in this many dot_products and sum_weighed_rows of a panel and a block.
static inline int64_t fetches(int64_t dot_products, int64_t sums, int64_t width) {
  return (dot_products * tiles_of(kTileTokens) * width + sums * (tiles_of(width) - 1) * kTileTokens) / Prefetch::kSteps;
}

// A row's weights are 2^(score - base). The base is raised, which rescales the sums, only where a score exceeds it by
// more than this: weights up to 2^8 do no harm.
constexpr float kSlack = 8;

// How the scores of a panel become weights. Where the base moves, the sums so far must be multiplied with `decay`.
struct Softmax {
  Vector base[kVectors] = {}, decay[kVectors] = {};
  bool moves = false;
};

// base: [16], that of the previous blocks; raised where a score is too far above it.
K5_INLINE Softmax make_softmax(const Vector (&highest)[kVectors], float* base) {
  Softmax softmax;
  for (int part = 0; part < kVectors; part++)
    softmax.moves |= any_above(highest[part], load_vector(base + part * kVectorLanes) + kSlack);
  for (int part = 0; part < kVectors; part++) {
    const Vector before = load_vector(base + part * kVectorLanes), now = softmax.moves ? highest[part] : before;
    store_vector(base + part * kVectorLanes, now);
    softmax.base[part] = now == -kInfinity ? Vector{} : now;  // so that a score of -inf has weight 0
    softmax.decay[part] = softmax.moves ? exp2(before - softmax.base[part]) : Vector{} + 1.0f;
  }
  return softmax;
}

// Scratch memory of one block of queries, kept while it reads its blocks of keys.
struct QueryBlock {
  float *queries, *out;  // panels
  float* scores;         // [2][64][16], for even and odd panels
  float *base, *total;   // [64] each; total: the sum of the weights
  int64_t panels;
};

// Computes the scores of a panel, in block.scores, and how they become weights.
K5_INLINE Softmax score(const QueryBlock& block, int64_t panel, const float* keys, int64_t count, int64_t width,
                        Prefetch& prefetch) {
  float* base = block.base + panel * kPanel;
  Vector highest[kVectors];
  for (int part = 0; part < kVectors; part++) highest[part] = load_vector(base + part * kVectorLanes);
  dot_products(
      keys, width, count, block.queries + panel * kPanel * width, width,
      block.scores + panel % 2 * kTileTokens * kPanel, kPanel,
      [&]<int Rows>(const Tile<Rows>& tile) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int row = 0; row < Rows; row++)
#pragma GCC unroll 2
          for (int part = 0; part < kVectors; part++) highest[part] = larger(tile.sums[row][part], highest[part]);
      },
      prefetch);
  return make_softmax(highest, base);
}

// Turns those scores into weights and adds the weighed values to block.out; where `first`, overwrites it.
K5_INLINE void add_values(const QueryBlock& block, int64_t panel, const Softmax& softmax, const float* values,
                          int64_t count, int64_t width, bool first, Prefetch& prefetch) {
  float* scores = block.scores + panel % 2 * kTileTokens * kPanel;
  float* out = block.out + panel * kPanel * width;
  Vector sums[kVectors] = {};
  sum_weighed_rows(
      values, count, width, scores, prefetch,
      [&](int64_t key) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int part = 0; part < kVectors; part++) {
          float* score = scores + key * kPanel + part * kVectorLanes;
          const Vector weight = exp2(load_vector(score) - softmax.base[part]);
          sums[part] += weight;
          store_vector(score, weight);
        }
      },
      [&]<int Rows>(const Tile<Rows>& tile, int64_t d) __attribute__((always_inline)) {
        if (first) Tile<Rows>::write(tile, out + d * kPanel, kPanel);
        else if (softmax.moves) Tile<Rows>::multiply_and_add_to(softmax.decay, tile, out + d * kPanel, kPanel);
        else Tile<Rows>::add_to(tile, out + d * kPanel, kPanel);
      });
  for (int part = 0; part < kVectors; part++) {
    float* total = block.total + panel * kPanel + part * kVectorLanes;
    store_vector(total, load_vector(total) * softmax.decay[part] + sums[part]);
  }
}

// Attention of all panels of queries to up to 64 keys: scores, online softmax, values. The scores of a panel are
// computed before the values of the previous panel are added, so that nothing waits for their maximum. first: whether
// these are the first keys that the block reads. kWidth: the width of a whole block of 64 keys, or 0 for any width and
// count.
template <int64_t kWidth>
__attribute__((noinline)) void attend(const QueryBlock& block, const float* keys, const float* values,
                                      int64_t any_count, int64_t any_width, bool first, Prefetch& prefetch) {
  const int64_t width = kWidth ? kWidth : any_width, count = kWidth ? kTileTokens : any_count;
  Softmax softmax, next;
  for (int64_t panel = 0; panel <= block.panels; panel++) {
    if (panel < block.panels) next = score(block, panel, keys, count, width, prefetch);
    if (panel > 0) add_values(block, panel - 1, softmax, values, count, width, first, prefetch);
    softmax = next;
  }
}

// Scratch memory of one block of keys, kept while the blocks of queries that read it are processed.
struct KeyBlock {
  const float *key_rows;  // [64][width]
  float *keys, *values;   // panels
  float *grad_keys, *grad_values;
};

// One part of the queries that read a block of keys.
struct ReaderRows {
  const float *queries;       // scaled as in the forward: scores then have the same bits as those from which lse was
                              // computed, and probabilities add up to one
  const float *grads;         // of the output
  const float *base, *shift;  // of AttentionBackward
  float* grad_q;              // or null
};

// Adds their contribution to all three gradients. weights: [64][16]; slopes: [panels][64][16]. kWidth: the width of
// whole blocks of 64 tokens, or 0 for any width and count.
template <int64_t kWidth>
__attribute__((noinline)) void add_gradients(const KeyBlock& block, const ReaderRows& reader, int64_t any_keys,
                                             int64_t any_count, int64_t any_width, float* weights, float* slopes,
                                             Prefetch& prefetch) {
  const int64_t width = kWidth ? kWidth : any_width, keys = kWidth ? kTileTokens : any_keys;
  const int64_t count = kWidth ? kTileTokens : any_count, panels = panels_of(keys);
  const auto nothing = [](const auto&) {};
  for (int64_t panel = 0; panel < panels; panel++) {
    const int64_t at = panel * width * kPanel;
    float* slope = slopes + panel * kTileTokens * kPanel;
    dot_products(reader.queries, width, count, block.keys + at, width, weights, kPanel, nothing, prefetch);
    dot_products(reader.grads, width, count, block.values + at, width, slope, kPanel, nothing, prefetch);
    sum_weighed_rows(
        reader.grads, count, width, weights, prefetch,
        [&](int64_t row) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int part = 0; part < kVectors; part++) {
            const int64_t i = row * kPanel + part * kVectorLanes;
            const Vector weight = exp2(load_vector(weights + i) - reader.base[row]);
            store_vector(weights + i, weight);
            store_vector(slope + i, weight * (load_vector(slope + i) - reader.shift[row]));
          }
        },
        adding_to(block.grad_values + at));
    sum_weighed_rows(reader.queries, count, width, slope, prefetch, [](int64_t) {}, adding_to(block.grad_keys + at));
  }
  if (!reader.grad_q) return;
  for (int64_t d = 0; d < width; d += kPanel)
    for_tiles(count, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
      auto tile = Tile<Rows>::zero();
      for (int64_t panel = 0; panel < panels; panel++)
        Tile<Rows>::add_product(tile, slopes + (panel * kTileTokens + row) * kPanel, kPanel, 1,
                                block.key_rows + panel * kPanel * width + d, width,
                                smaller(kPanel, keys - panel * kPanel));
      Tile<Rows>::add_to(tile, reader.grad_q + row * width + d, width);
    });
}

// The first block of keys of a share.
template <class T>
int64_t first_block(const AttentionBackward<T>& op, int64_t share) {
  return share * op.sizes.blocks / op.shares;
}

K5_INLINE void add_floats(float* sums, const float* terms, int64_t count) {
  for (int64_t i = 0; i < count; i++) sums[i] += terms[i];
}

// Writes the gradients of k and v of a block, and adds its contribution to grad_q: float32 rows of the whole head, or
// null.
template <class T>
void gradients_of_keys(const AttentionBackward<T>& op, const Place& at, float* scratch, float* grad_q) {
  const AttentionSizes& sizes = op.sizes;
  const int64_t width = sizes.width, padded_width = padded(width), block_floats = kTileTokens * padded_width;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  const T* grad_out = head_of(op.grad_out, at);
  const float* base = head_of(op.base, at);
  const float* shift = head_of(op.shift, at);
  float* key_rows = scratch;
  float* query_rows = key_rows + block_floats;
  float* grad_rows = query_rows + block_floats;
  KeyBlock block;
  block.key_rows = key_rows;
  block.keys = grad_rows + block_floats;
  block.values = block.keys + block_floats;
  block.grad_keys = block.values + block_floats;
  block.grad_values = block.grad_keys + block_floats;
  float* weights = block.grad_values + block_floats;
  float* slopes = weights + kTileTokens * kPanel;
  float* factors = slopes + kTileTokens * kTileTokens;
  Prefetch prefetch;
  for_parts(sizes, at.block, [&](int64_t first, int64_t keys) {
    read_panels(v + first * op.v.step, op.v.step, keys, width, 1.0f, block.values);
    read_rows(k + first * op.k.step, op.k.step, keys, width, 1.0f, key_rows);
    read_panels(key_rows, padded_width, keys, padded_width, 1.0f, block.keys);
    fill(block.grad_keys, 2 * block_floats, 0.0f);
    const int64_t* offsets = offsets_of(op.readers, at) + at.block;
    for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) {
      prefetch.clear();
      if (entry + 1 < offsets[1]) {
        const int64_t next = op.readers.indices[entry + 1], next_first = sizes.block_starts[next];
        fetch_block(prefetch, sizes, op.q, at, next);
        fetch_block(prefetch, sizes, op.grad_out, at, next);
        if (grad_q)
          prefetch.add(grad_q + next_first * padded_width, padded_width,
                       smaller(kTileTokens, sizes.block_starts[next + 1] - next_first), padded_width);
      } else if (at.block + 1 < sizes.blocks) {
        fetch_block(prefetch, sizes, op.k, at, at.block + 1);
        fetch_block(prefetch, sizes, op.v, at, at.block + 1);
      }
      prefetch.spread_over(panels_of(keys) * fetches(2, 2, padded_width));
      for_parts(sizes, op.readers.indices[entry], [&](int64_t token, int64_t count) {
        read_rows(q + token * op.q.step, op.q.step, count, width, sizes.scale * kLog2E, query_rows);
        const ReaderRows reader{
            query_rows, dense_rows(grad_out + token * op.grad_out.step, op.grad_out.step, count, width, grad_rows),
            base + token, shift + token, grad_q ? grad_q + token * padded_width : nullptr};
        for_width(count == kTileTokens && keys == kTileTokens, padded_width, [&]<int64_t kWidth>() {
          add_gradients<kWidth>(block, reader, keys, count, padded_width, weights, slopes, prefetch);
        });
      });
    }
    fill(factors, kTileTokens, kLn2);  // the queries were multiplied with scale · log2(e); this leaves scale
    write_panels(block.grad_keys, factors, keys, width, head_of(op.grad_k, at) + first * op.grad_k.step,
                 op.grad_k.step);
    fill(factors, kTileTokens, 1.0f);
    write_panels(block.grad_values, factors, keys, width, head_of(op.grad_v, at) + first * op.grad_v.step,
                 op.grad_v.step);
  });
}

// Adds the contribution of up to 64 keys to the gradient of q of one panel of queries. kWidth: as in `attend`.
template <int64_t kWidth>
__attribute__((noinline)) void add_query_gradient(const float* keys, const float* values, int64_t any_count,
                                                  int64_t any_width, const float* queries, const float* grads,
                                                  const float* base, const float* shift, float* weights,
                                                  float* slopes, float* grad_q, Prefetch& prefetch) {
  const int64_t width = kWidth ? kWidth : any_width, count = kWidth ? kTileTokens : any_count;
  const auto nothing = [](const auto&) {};
  dot_products(keys, width, count, queries, width, weights, kPanel, nothing, prefetch);
  dot_products(values, width, count, grads, width, slopes, kPanel, nothing, prefetch);
  sum_weighed_rows(
      keys, count, width, slopes, prefetch,
      [&](int64_t key) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int part = 0; part < kVectors; part++) {
          const int64_t i = key * kPanel + part * kVectorLanes;
          const Vector weight = exp2(load_vector(weights + i) - load_vector(base + part * kVectorLanes));
          store_vector(slopes + i, weight * (load_vector(slopes + i) - load_vector(shift + part * kVectorLanes)));
        }
      },
      adding_to(grad_q));
}

}  // namespace

template <class T>
void block_sparse_attention(const Attention<T>& op, int64_t item, float* scratch) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t width = sizes.width, padded_width = padded(width), block_floats = kTileTokens * padded_width;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  QueryBlock block;
  block.queries = scratch;
  block.out = block.queries + block_floats;
  float* key_rows = block.out + block_floats;
  float* value_rows = key_rows + block_floats;
  block.scores = value_rows + block_floats;
  block.base = block.scores + 2 * kTileTokens * kPanel;
  block.total = block.base + kTileTokens;
  const int64_t* offsets = offsets_of(op.reads, at) + at.block;
  Prefetch prefetch;
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    block.panels = panels_of(rows);
    read_panels(q + first * op.q.step, op.q.step, rows, width, sizes.scale * kLog2E, block.queries);
    fill(block.base, kTileTokens, -kInfinity);
    fill(block.total, kTileTokens, 0.0f);
    bool gathered = false;
    for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) {
      fetch_next(prefetch, op, at, entry);
      prefetch.spread_over(block.panels * fetches(1, 1, padded_width));
      for_parts(sizes, op.reads.indices[entry], [&](int64_t token, int64_t count) {
        const float* keys = dense_rows(k + token * op.k.step, op.k.step, count, width, key_rows);
        const float* values = dense_rows(v + token * op.v.step, op.v.step, count, width, value_rows);
        for_width(count == kTileTokens, padded_width, [&]<int64_t kWidth>() {
          attend<kWidth>(block, keys, values, count, padded_width, !gathered, prefetch);
        });
        gathered = true;
      });
    }
    if (!gathered) fill(block.out, block.panels * kPanel * padded_width, 0.0f);
    finish_rows(block.base, block.total, rows, !gathered, head_of(op.lse, at) + first);
    write_panels(block.out, block.total, rows, width, head_of(op.out, at) + first * op.out.step, op.out.step);
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
void share_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch, float* grad_q_part) {
  const int64_t head = item / op.shares, share = item % op.shares;
  fill(grad_q_part, attention_grad_q_part(op.sizes), 0.0f);
  Place at{head / op.sizes.heads, head % op.sizes.heads, first_block(op, share)};
  for (; at.block < first_block(op, share + 1); at.block++) gradients_of_keys(op, at, scratch, grad_q_part);
}

template <class T>
void add_grad_q_parts(const AttentionBackward<T>& op, int64_t item, float* scratch, const float* parts) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t padded_width = padded(sizes.width);
  float *factors = scratch, *sums = scratch + kTileTokens;
  fill(factors, kTileTokens, sizes.scale);
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    fill(sums, rows * padded_width, 0.0f);
    for (int64_t share = 0; share < op.shares; share++)
      add_floats(sums, parts + share * attention_grad_q_part(sizes) + first * padded_width, rows * padded_width);
    write_rows(sums, factors, rows, sizes.width, head_of(op.grad_q, at) + first * op.grad_q.step, op.grad_q.step);
  });
}

template <class T>
void key_block_gradients(const AttentionBackward<T>& op, int64_t item, float* scratch) {
  gradients_of_keys(op, place_of(op.sizes, item), scratch, nullptr);
}

template <class T>
void query_block_gradient(const AttentionBackward<T>& op, int64_t item, float* scratch) {
  const AttentionSizes& sizes = op.sizes;
  const Place at = place_of(sizes, item);
  const int64_t width = sizes.width, padded_width = padded(width), block_floats = kTileTokens * padded_width;
  const T* q = head_of(op.q, at);
  const T* k = head_of(op.k, at);
  const T* v = head_of(op.v, at);
  const T* grad_out = head_of(op.grad_out, at);
  float* key_rows = scratch;
  float* value_rows = key_rows + block_floats;
  float* queries = value_rows + block_floats;
  float* grads = queries + block_floats;
  float* grad_q = grads + block_floats;
  float* grad_q_part = grad_q + block_floats;
  float* weights = grad_q_part + block_floats;
  float* slopes = weights + kTileTokens * kPanel;
  float* base = slopes + kTileTokens * kPanel;
  float* shift = base + kTileTokens;
  Prefetch prefetch;
  for_parts(sizes, at.block, [&](int64_t first, int64_t rows) {
    read_panels(q + first * op.q.step, op.q.step, rows, width, sizes.scale * kLog2E, queries);
    read_panels(grad_out + first * op.grad_out.step, op.grad_out.step, rows, width, 1.0f, grads);
    fill(grad_q, 2 * block_floats, 0.0f);
    fill(base, 2 * kTileTokens, 0.0f);
    for (int64_t row = 0; row < rows; row++) {
      base[row] = head_of(op.base, at)[first + row];
      shift[row] = head_of(op.shift, at)[first + row];
    }
    const auto end_share = [&] {
      add_floats(grad_q, grad_q_part, block_floats);
      fill(grad_q_part, block_floats, 0.0f);
    };
    int64_t share = 0;
    const int64_t* offsets = offsets_of(op.reads, at) + at.block;
    for (int64_t entry = offsets[0]; entry < offsets[1]; entry++) {
      for (; op.reads.indices[entry] >= first_block(op, share + 1); share++) end_share();
      prefetch.clear();
      if (entry + 1 < offsets[1]) {
        fetch_block(prefetch, sizes, op.k, at, op.reads.indices[entry + 1]);
        fetch_block(prefetch, sizes, op.v, at, op.reads.indices[entry + 1]);
      } else if (at.block + 1 < sizes.blocks) {
        fetch_block(prefetch, sizes, op.q, at, at.block + 1);
        fetch_block(prefetch, sizes, op.grad_out, at, at.block + 1);
      }
      prefetch.spread_over(panels_of(rows) * fetches(2, 1, padded_width));
      for_parts(sizes, op.reads.indices[entry], [&](int64_t token, int64_t count) {
        const float* keys = dense_rows(k + token * op.k.step, op.k.step, count, width, key_rows);
        const float* values = dense_rows(v + token * op.v.step, op.v.step, count, width, value_rows);
        for_width(count == kTileTokens, padded_width, [&]<int64_t kWidth>() {
          for (int64_t from = 0; from < rows; from += kPanel)
            add_query_gradient<kWidth>(keys, values, count, padded_width, queries + from * padded_width,
                                       grads + from * padded_width, base + from, shift + from, weights, slopes,
                                       grad_q_part + from * padded_width, prefetch);
        });
      });
    }
    end_share();
    float* factors = base;
    fill(factors, kTileTokens, sizes.scale);
    write_panels(grad_q, factors, rows, width, head_of(op.grad_q, at) + first * op.grad_q.step,
               op.grad_q.step);
  });
}

#define K5_INSTANTIATE(T)                                                                                         \
  template void block_sparse_attention(const Attention<T>&, int64_t, float*);                                     \
  template void prepare_attention_backward(const AttentionSaved<T>&, int64_t, int64_t);                           \
  template void share_gradients(const AttentionBackward<T>&, int64_t, float*, float*);                            \
  template void add_grad_q_parts(const AttentionBackward<T>&, int64_t, float*, const float*);                     \
  template void key_block_gradients(const AttentionBackward<T>&, int64_t, float*);                                \
  template void query_block_gradient(const AttentionBackward<T>&, int64_t, float*);
K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)
#undef K5_INSTANTIATE

}  // namespace k5::K5_ISA
