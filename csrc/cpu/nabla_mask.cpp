// The selection needs no sort: non-negative floats have the order of their bits, so the value at which the mass is
// reached is found by bisection over bits, and only the last few candidates are sorted.
#include "nabla_mask.h"

#include "prefetch.h"
#include "vec_math.h"

namespace k5::K5_ISA {
namespace {

typedef double DVec4 __attribute__((vector_size(32)));

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kWordBits = 64;
constexpr int64_t kStride = 4 * kLanes;
// The bisection ends when so few candidates are left; these are sorted.
constexpr int64_t kFew = 12;
// The first step of the search away from its guess, in bits: a quarter of an octave.
constexpr uint32_t kFirstReach = 1 << 21;

K5_INLINE Vec8 where(IVec8 mask, Vec8 value) { return (Vec8)((IVec8)value & mask); }

// Bit i for lane i.
K5_INLINE uint64_t lanes_set(IVec8 mask) {
#ifdef __AVX2__
  return _mm256_movemask_ps((__m256)mask);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < kLanes; lane++) bits |= (uint64_t)(mask[lane] & 1) << lane;
  return bits;
#endif
}

K5_INLINE void add_in_double(DVec4* sums, Vec8 value) {
#ifdef __AVX2__
  sums[0] += (DVec4)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)value));
  sums[1] += (DVec4)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)value, 1));
#else
  for (int lane = 0; lane < kLanes; lane++) sums[lane / 4][lane % 4] += value[lane];
#endif
}

// The probabilities of a row, padded with +inf to a multiple of kStride, and its bits in NablaSelection.
struct Row {
  const float* probabilities;
  int64_t count;
  uint64_t* bits;
};

K5_INLINE int64_t words_of(const Row& row) { return (row.count + kWordBits - 1) / kWordBits; }

K5_INLINE void keep(const Row& row, int64_t i) { row.bits[i / kWordBits] |= uint64_t{1} << (i % kWordBits); }

K5_INLINE void pad(float* row, int64_t count, float value) {
  for (int64_t i = count; i % kStride; i++) row[i] = value;
}

// The sum of the probabilities below `bound`.
double sum_below(const Row& row, float bound) {
  DVec4 sums[2 * kStride / kLanes] = {};
  for (int64_t i = 0; i < row.count; i += kStride)
    for (int64_t part = 0; part < kStride / kLanes; part++) {
      const Vec8 value = load(row.probabilities + i + part * kLanes);
      add_in_double(sums + 2 * part, where(value < bound, value));
    }
  double total = 0;
  for (const DVec4& four : sums)
    for (int lane = 0; lane < 4; lane++) total += four[lane];
  return total;
}

struct Mass {
  float sum;
  int64_t count;
};

// Their sum in float, and their number.
Mass mass_below(const Row& row, float bound) {
  Vec8 sums[kStride / kLanes] = {};
  IVec8 counts[kStride / kLanes] = {};
  for (int64_t i = 0; i < row.count; i += kStride)
    for (int64_t part = 0; part < kStride / kLanes; part++) {
      const Vec8 value = load(row.probabilities + i + part * kLanes);
      const IVec8 below = value < bound;
      counts[part] -= below;
      sums[part] += where(below, value);
    }
  for (int64_t part = 1; part < kStride / kLanes; part++) {
    sums[0] += sums[part];
    counts[0] += counts[part];
  }
  Mass mass = {sum(sums[0]), 0};
  for (int lane = 0; lane < kLanes; lane++) mass.count += counts[0][lane];
  return mass;
}

// Calls body(word, bits) for every word; bit i is set where the test holds for probability i of the word.
template <class Test, class Body>
K5_INLINE void for_words(const Row& row, const Test& test, const Body& body) {
  for (int64_t word = 0; word < words_of(row); word++) {
    const int64_t count = smaller(row.count - word * kWordBits, kWordBits);
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; i += kLanes)
      bits |= lanes_set(test(load(row.probabilities + word * kWordBits + i))) << i;
    body(word, bits & ~uint64_t{0} >> (kWordBits - count));
  }
}

void keep_all(const Row& row) {
  for_words(row, [](Vec8) { return ~IVec8{}; }, [&](int64_t word, uint64_t bits) { row.bits[word] = bits; });
}

// Keeps the probabilities that are at least `least`, except for the first `dropped` of those equal to it.
void keep_from(const Row& row, float least, int64_t dropped) {
  for_words(row, [&](Vec8 value) { return value >= least; },
            [&](int64_t word, uint64_t bits) { row.bits[word] = bits; });
  if (!dropped) return;
  for_words(row, [&](Vec8 value) { return value == least; }, [&](int64_t word, uint64_t bits) {
    for (; bits && dropped; bits &= bits - 1, dropped--) row.bits[word] &= ~(bits & -bits);
  });
}

// Keeps the last of the largest probabilities.
void keep_largest(const Row& row, float largest) {
  int64_t equal = 0;
  for_words(row, [&](Vec8 value) { return value == largest; },
            [&](int64_t, uint64_t bits) { equal += __builtin_popcountll(bits); });
  keep_from(row, largest, equal - 1);
}

// Copies the probabilities p with first <= p < end, in order, and returns their number. `target` may be the row itself.
int64_t gather(const Row& row, float first, float end, float* target) {
  int64_t found = 0;
  for_words(row, [&](Vec8 value) { return (value >= first) & (value < end); }, [&](int64_t word, uint64_t bits) {
    for (; bits; bits &= bits - 1) target[found++] = row.probabilities[word * kWordBits + __builtin_ctzll(bits)];
  });
  return found;
}

K5_INLINE void sort(float* values, int64_t count) {
  for (int64_t i = 1; i < count; i++) {
    const float value = values[i];
    int64_t slot = i;
    for (; slot > 0 && values[slot - 1] > value; slot--) values[slot] = values[slot - 1];
    values[slot] = value;
  }
}

// The value i at which a cumulative sum reaches the mass, the sum before it and the sum with it.
struct Crossing {
  int64_t i;
  double before, at;
};

// value(i): the i-th value, in ascending order. sum: of all smaller values.
template <class Value>
K5_INLINE Crossing cross(const Value& value, int64_t count, double sum, float dropped_mass) {
  double before = sum;
  for (int64_t i = 0; i < count; i++, before = sum) {
    sum += value(i);
    if ((float)sum >= dropped_mass) return {i, before, sum};
  }
  return {count, sum, __builtin_inf()};
}

// Keeps what an ascending sort and a cumulative sum in double, rounded to float, would: everything from where the sum
// reaches dropped_mass, and the largest probability even where it does not. Sums are taken in float, and again in
// double where the error of a float sum could change the result.
// least, most: the smallest and the largest probability. guess: where the search starts; on return the smallest
// probability kept. scratch: row.count floats.
void select(const Row& row, float least, float most, float dropped_mass, float& guess, float* scratch) {
  if (!(dropped_mass > 0)) return keep_all(row);
  // Probabilities add up to one up to rounding: only a dropped mass this large may not be reached.
  if (dropped_mass > 0.99f && (float)sum_below(row, kInfinity) < dropped_mass) return keep_largest(row, most);
  // A bound of the relative error of `mass_below`, in which each lane adds count / kStride numbers before the lanes are
  // added; it also exceeds the error of rounding a sum to float.
  const double error = (row.count / kStride + 10) * 0x1.1p-24;
  const double certainly_less = dropped_mass * (1 - error), certainly_more = dropped_mass * (1 + error);
  // Always: the sum of the probabilities below `low` is less than the mass, the sum of those below `high` reaches it.
  uint32_t low = bits_as<uint32_t>(least), high = bits_as<uint32_t>(most) + 1;
  int64_t below_low = 0, below_high = row.count;
  double sum_low = 0;
  Row candidates = row;  // the probabilities that may still matter, once those below some `low` are left out
  double settled = 0;    // the sum and the number of those that are left out
  int64_t settled_count = 0;
  uint32_t middle = bits_as<uint32_t>(guess), reach = kFirstReach;
  while (below_high - below_low > kFew && high - low > 1) {
    if (candidates.count > kWordBits && 16 * (below_high - below_low) < candidates.count) {
      settled = sum_low;
      settled_count = below_low;
      const int64_t found = gather(candidates, bits_as<float>(low), bits_as<float>(high), scratch);
      pad(scratch, found, kInfinity);
      candidates = {scratch, found, nullptr};
    }
    if (middle <= low || middle >= high) middle = low + (high - low) / 2;
    const Mass mass = mass_below(candidates, bits_as<float>(middle));
    double sum = settled + mass.sum;
    if (sum > certainly_less && sum < certainly_more) sum = sum_below(row, bits_as<float>(middle));
    if ((float)sum < dropped_mass) {
      low = middle;
      below_low = settled_count + mass.count;
      sum_low = sum;
      middle = low + reach;
    } else {
      high = middle;
      below_high = settled_count + mass.count;
      middle = high - reach;
    }
    reach *= 4;  // once this leads out of the bracket, the bracket is halved
  }
  const bool equal = high - low == 1;
  const int64_t count = below_high - below_low;
  float few[kFew];
  if (!equal) {
    gather(candidates, bits_as<float>(low), bits_as<float>(high), few);
    sort(few, count);
  }
  const auto value = [&](int64_t i) { return equal ? bits_as<float>(low) : few[i]; };
  Crossing crossing = cross(value, count, sum_low, dropped_mass);
  if (crossing.before > certainly_less || crossing.at < certainly_more)
    crossing = cross(value, count, sum_below(row, bits_as<float>(low)), dropped_mass);
  guess = crossing.i < count ? value(crossing.i) : bits_as<float>(high);
  if (guess > most) return keep_largest(row, most);  // the sum of all, added up in this order, rounds below the mass
  int64_t dropped = 0;
  while (dropped < crossing.i && crossing.i < count && value(crossing.i - dropped - 1) == guess) dropped++;
  keep_from(row, guess, dropped);
}

K5_INLINE float extreme(Vec8 values, bool largest) {
  float result = values[0];
  for (int lane = 1; lane < kLanes; lane++)
    result = (largest ? values[lane] > result : values[lane] < result) ? values[lane] : result;
  return result;
}

// Turns the logits into probabilities, in place, and selects.
void select_from_logits(float* logits, const Row& row, float factor, float dropped_mass, float& guess,
                        float* scratch) {
  pad(logits, row.count, -kInfinity);
  Vec8 highest = Vec8{} - kInfinity;
  for (int64_t i = 0; i < row.count; i += kLanes) highest = larger(load(logits + i), highest);
  const float top = extreme(highest, true);
  Vec8 sums = {};
  for (int64_t i = 0; i < row.count; i += kLanes) {
    const Vec8 weight = exp2((load(logits + i) - top) * factor);
    store(logits + i, weight);
    sums += weight;
  }
  const float total = sum(sums);
  if (total != total) return keep_all(row);  // so that attention passes the NaN on
  const float inverse = 1 / total;
  pad(logits, row.count, kInfinity);
  Vec8 lowest = Vec8{} + kInfinity;
  for (int64_t i = 0; i < row.count; i += kLanes) {
    const Vec8 probability = load(logits + i) * inverse;
    store(logits + i, probability);
    lowest = -larger(-lowest, -probability);
  }
  select(row, extreme(lowest, false), inverse, dropped_mass, guess, scratch);
}

template <class T>
K5_INLINE const T* tokens_of(const BlockMeans<T>& op, int64_t head, int64_t block) {
  return op.source + head / op.heads * op.batch_stride + head % op.heads * op.head_stride +
         op.block_starts[block] * op.step;
}

// Calls write(d, means) with the means over the tokens of a block of the elements d to d + 7.
template <class T, class Write>
K5_INLINE void for_means(const BlockMeans<T>& op, int64_t head, int64_t block, const Write& write) {
  const int64_t count = op.block_starts[block + 1] - op.block_starts[block];
  const T* tokens = tokens_of(op, head, block);
  constexpr int64_t kParts = 8;
  const float divisor = count;
  int64_t d = 0;
  for (; d + kParts * kLanes <= op.width; d += kParts * kLanes) {
    Vec8 sums[kParts] = {};
    for (int64_t token = 0; token < count; token++)
      for (int64_t part = 0; part < kParts; part++) sums[part] += load(tokens + token * op.step + d + part * kLanes);
    for (int64_t part = 0; part < kParts; part++) write(d + part * kLanes, sums[part] / divisor);
  }
  for (; d < padded(op.width); d += kLanes) {
    const int64_t there = smaller(kLanes, op.width - d);
    Vec8 sums = {};
    for (int64_t token = 0; token < count && there > 0; token++)
      sums += load_partial(tokens + token * op.step + d, there);
    write(d, sums / divisor);
  }
}

// The means of a head. rows: the number of means of a head that there is memory for.
template <class T>
K5_INLINE float* means_of(const BlockMeans<T>& op, int64_t head, int64_t rows) {
  return op.pooled + head % 2 * rows * padded(op.width);
}

template <class T>
void pool_queries(const BlockMeans<T>& op, int64_t head, int64_t first, int64_t end) {
  float* rows = means_of(op, head, op.blocks);
  for (int64_t block = first; block < end; block++)
    for_means(op, head, block, [&](int64_t d, Vec8 means) { store(rows + block * padded(op.width) + d, means); });
}

// Writes the means of the blocks of one panel, and zeros to its other columns.
template <class T>
void pool_keys(const BlockMeans<T>& op, int64_t head, int64_t first, int64_t end) {
  float* panel = means_of(op, head, padded(op.blocks)) + first * padded(op.width);
  for (int64_t block = first; block < end; block++)
    for_means(op, head, block, [&](int64_t d, Vec8 means) {
      for (int64_t lane = 0; lane < kLanes; lane++) panel[(d + lane) * kPanel + block - first] = means[lane];
    });
  for (int64_t d = 0; d < padded(op.width); d++)
    for (int64_t column = end - first; column < kPanel; column++) panel[d * kPanel + column] = 0;
}

// Selects for the query blocks from first to last, at most kLogitRows of one clip. queries: their means. keys: the
// means of all key blocks of the head.
void select_rows(const NablaSelection& op, const float* queries, const float* keys, int64_t padded_width, int64_t head,
                 int64_t first, int64_t last, int64_t clip_start, int64_t clip_end, Prefetch& prefetch,
                 float* scratch) {
  const int64_t step = logits_step(op.blocks), first_panel = clip_start / kPanel;
  for (int64_t panel = first_panel; panel < panels_of(clip_end); panel++)
    dot_products(queries, padded_width, last - first, keys + panel * kPanel * padded_width, padded_width,
                 scratch + (panel - first_panel) * kPanel, step,
                 [&](const auto&) { prefetch.next_lines<kMayDrop>(); }, [](int64_t) {});
  float guess = 0;
  for (int64_t block = first; block < last; block++) {
    float* logits = scratch + (block - first) * step + clip_start % kPanel;
    const int64_t number = head * op.blocks + block;
    const Row row{logits, clip_end - clip_start, op.bits + number * op.row_words};
    select_from_logits(logits, row, op.scale * 1.44269504f, op.dropped_mass, guess,
                       scratch + kLogitRows * step);
    if (op.near_offsets)
      for (int64_t entry = op.near_offsets[block]; entry < op.near_offsets[block + 1]; entry++)
        keep(row, op.near_indices[entry] - clip_start);
    op.counts[number] = 0;
    for (int64_t word = 0; word < words_of(row); word++) op.counts[number] += __builtin_popcountll(row.bits[word]);
  }
}

}  // namespace

template <class T>
void nabla_select(const NablaSelection& op, const BlockMeans<T>& queries, const BlockMeans<T>& keys, int64_t head,
                  int64_t piece, float* scratch) {
  const int64_t start = piece * kPieceBlocks, end = smaller(op.blocks, start + kPieceBlocks);
  const int64_t padded_width = padded(queries.width);
  Prefetch prefetch;
  if (head < op.heads) {
    const int64_t tokens = queries.block_starts[end] - queries.block_starts[start];
    prefetch.add(tokens_of(queries, head, start), queries.step, tokens, queries.width);
    prefetch.add(tokens_of(keys, head, start), keys.step, tokens, keys.width);
    prefetch.spread_over(panels_of(op.blocks) * ((end - start + kLogitRows - 1) / kLogitRows));
  }
  int64_t clip = 0;
  for (int64_t first = start, last; head > 0 && first < end; first = last) {
    while (op.clip_starts[clip + 1] <= first) clip++;
    const int64_t clip_end = op.clip_starts[clip + 1];
    last = smaller(smaller(first + kLogitRows, end), clip_end);
    select_rows(op, means_of(queries, head - 1, op.blocks) + first * padded_width,
                means_of(keys, head - 1, padded(op.blocks)), padded_width, head - 1, first, last, op.clip_starts[clip],
                clip_end, prefetch, scratch);
  }
  if (head < op.heads) {
    pool_queries(queries, head, start, end);
    pool_keys(keys, head, start, end);
  }
}

void nabla_lists(const NablaSelection& op, const int64_t* offsets, int32_t* indices, int64_t first, int64_t end) {
  for (int64_t number = first; number < end; number++) {
    const int64_t block = number % op.blocks, head = number / op.blocks;
    int64_t clip = 0;
    while (op.clip_starts[clip + 1] <= block) clip++;
    const int64_t keys = op.clip_starts[clip], count = op.clip_starts[clip + 1] - keys;
    const Row row{nullptr, count, op.bits + number * op.row_words};
    int32_t* out = indices + offsets[head * (op.blocks + 1) + block];
    for (int64_t word = 0; word < words_of(row); word++)
      for (uint64_t bits = row.bits[word]; bits; bits &= bits - 1)
        *out++ = keys + word * kWordBits + __builtin_ctzll(bits);
  }
}

#define K5_INSTANTIATE(T)                                                                                       \
  template void nabla_select(const NablaSelection&, const BlockMeans<T>&, const BlockMeans<T>&, int64_t, int64_t, \
                             float*);
K5_INSTANTIATE(float)
K5_INSTANTIATE(BFloat16)
#undef K5_INSTANTIATE

}  // namespace k5::K5_ISA
