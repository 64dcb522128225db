// The selection needs no sort: non-negative floats stand in the order of their bits, so the value at which the mass is
// reached is found by bisection over bits, and only the last few candidates are sorted.
#include "nabla_mask.h"

namespace k5::K5_ISA {
namespace {

typedef int32_t IVec8 __attribute__((vector_size(32)));
typedef double DVec4 __attribute__((vector_size(32)));

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kWordBits = 64;
constexpr int64_t kStride = 4 * kLanes;
// Candidates that are sorted instead of bisected further.
constexpr int64_t kFew = 12;

K5_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

K5_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

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

// The probabilities of a row, with +inf behind them up to a multiple of kStride, and the bits to set.
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

// The same in float, and the number of these probabilities.
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

// Calls body(word, bits of the probabilities from `first` to below `end`, bits of those from `end`) for every word.
template <class Body>
K5_INLINE void for_words(const Row& row, float first, float end, const Body& body) {
  for (int64_t word = 0; word < words_of(row); word++) {
    uint64_t between = 0, above = 0;
    for (int64_t i = word * kWordBits; i < smaller(row.count, (word + 1) * kWordBits); i += kLanes) {
      const Vec8 value = load(row.probabilities + i);
      between |= lanes_set((value >= first) & (value < end)) << (i % kWordBits);
      above |= lanes_set((value >= end) & (value < kInfinity)) << (i % kWordBits);
    }
    body(word, between, above);
  }
}

void keep_all(const Row& row) {
  for (int64_t word = 0; word < words_of(row); word++) row.bits[word] = ~uint64_t{0};
  if (row.count % kWordBits) row.bits[words_of(row) - 1] = ~uint64_t{0} >> (kWordBits - row.count % kWordBits);
}

void keep_none(const Row& row) {
  for (int64_t word = 0; word < words_of(row); word++) row.bits[word] = 0;
}

// Keeps the probabilities from `end`, and of the few from `first` to below it, in ascending order, those from where
// the sum, which starts at `sum`, reaches the mass.
void keep_of_few(const Row& row, float first, float end, double sum, float dropped_mass) {
  float values[kFew];
  int64_t places[kFew];
  int64_t found = 0;
  for_words(row, first, end, [&](int64_t word, uint64_t between, uint64_t above) {
    row.bits[word] = above;
    for (; between; between &= between - 1) {
      const int64_t place = word * kWordBits + __builtin_ctzll(between);
      const float value = row.probabilities[place];
      int64_t slot = found++;
      for (; slot > 0 && values[slot - 1] > value; slot--) {
        values[slot] = values[slot - 1];
        places[slot] = places[slot - 1];
      }
      values[slot] = value;
      places[slot] = place;
    }
  });
  for (int64_t i = 0; i < found; i++) {
    sum += values[i];
    if ((float)sum >= dropped_mass) keep(row, places[i]);
  }
}

// The same where all of any number of candidates are equal.
void keep_of_equal(const Row& row, float value, double sum, float dropped_mass) {
  const float end = float_of(bits_of(value) + 1);
  for_words(row, value, end, [&](int64_t word, uint64_t between, uint64_t above) {
    row.bits[word] = above;
    for (; between; between &= between - 1) {
      sum += value;
      if ((float)sum >= dropped_mass) row.bits[word] |= between & -between;
    }
  });
}

// The probabilities from `first` to below `end`, in order; `target` may be where the row stands.
Row gather(const Row& row, float first, float end, float* target) {
  int64_t found = 0;
  for_words(row, first, end, [&](int64_t word, uint64_t between, uint64_t) {
    for (; between; between &= between - 1)
      target[found++] = row.probabilities[word * kWordBits + __builtin_ctzll(between)];
  });
  pad(target, found, kInfinity);
  return {target, found, nullptr};
}

// Keeps what an ascending sort and a cumulative sum in double, rounded to float, would: all from where the sum reaches
// dropped_mass. least and most: of the probabilities; scratch: as many floats.
void select(const Row& row, float least, float most, float dropped_mass, float* scratch) {
  if (!(dropped_mass > 0)) return keep_all(row);
  // They add up to one but for rounding.
  if (dropped_mass > 0.99f && (float)sum_below(row, kInfinity) < dropped_mass) return keep_none(row);
  // The sum below `low` misses the mass, the sum below `high` reaches it.
  uint32_t low = bits_of(least), high = bits_of(most) + 1;
  int64_t below_low = 0, below_high = row.count;
  Row candidates = row;  // those not below an earlier `low`; of the others, sum and number:
  double settled = 0;
  int64_t settled_count = 0;
  while (below_high - below_low > kFew && high - low > 1) {
    if (candidates.count > kWordBits && 16 * (below_high - below_low) < candidates.count) {
      settled += sum_below(candidates, float_of(low));
      settled_count = below_low;
      candidates = gather(candidates, float_of(low), float_of(high), scratch);
    }
    const float middle = float_of(low + (high - low) / 2);
    const Mass mass = mass_below(candidates, middle);
    double sum = settled + mass.sum;
    const double doubt = candidates.count * 1.2e-7;  // more than the float sum errs
    if (sum > dropped_mass - doubt && sum < dropped_mass + doubt) sum = settled + sum_below(candidates, middle);
    if ((float)sum < dropped_mass) {
      low = bits_of(middle);
      below_low = settled_count + mass.count;
    } else {
      high = bits_of(middle);
      below_high = settled_count + mass.count;
    }
  }
  settled += sum_below(candidates, float_of(low));
  if (high - low == 1)
    keep_of_equal(row, float_of(low), settled, dropped_mass);
  else
    keep_of_few(row, float_of(low), float_of(high), settled, dropped_mass);
}

K5_INLINE float extreme(Vec8 values, bool largest) {
  float result = values[0];
  for (int lane = 1; lane < kLanes; lane++)
    result = (largest ? values[lane] > result : values[lane] < result) ? values[lane] : result;
  return result;
}

// Logits to probabilities, in place, then the selection.
void select_from_logits(float* logits, const Row& row, float factor, float dropped_mass, float* scratch) {
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
  if (total != total) return keep_all(row);  // a NaN is left to the attention to pass on
  const float inverse = 1 / total;
  pad(logits, row.count, kInfinity);
  Vec8 lowest = Vec8{} + kInfinity;
  for (int64_t i = 0; i < row.count; i += kLanes) {
    const Vec8 probability = load(logits + i) * inverse;
    store(logits + i, probability);
    lowest = lowest < probability ? lowest : probability;
  }
  select(row, extreme(lowest, false), inverse, dropped_mass, scratch);
}

// Calls write(d, means of the elements d to d + 7) for the mean over the tokens of a block.
template <class T, class Write>
K5_INLINE void for_means(const BlockMeans<T>& op, int64_t item, const Write& write) {
  const int64_t block = item % op.blocks, head = item / op.blocks;
  const int64_t first = op.block_starts[block], count = op.block_starts[block + 1] - first;
  const T* tokens = op.source + head / op.heads * op.batch_stride + head % op.heads * op.head_stride + first * op.step;
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

}  // namespace

template <class T>
void pool_queries(const BlockMeans<T>& op, int64_t first, int64_t end) {
  for (int64_t item = first; item < end; item++)
    for_means(op, item, [&](int64_t d, Vec8 means) { store(op.pooled + item * padded(op.width) + d, means); });
}

template <class T>
void pool_keys(const BlockMeans<T>& op, int64_t first, int64_t end) {
  for (int64_t item = first; item < end; item++) {
    const int64_t block = item % op.blocks, head = item / op.blocks;
    float* panel = op.pooled + (head * padded(op.blocks) + block / kPanel * kPanel) * padded(op.width);
    for_means(op, item, [&](int64_t d, Vec8 means) {
      for (int64_t lane = 0; lane < kLanes; lane++) panel[(d + lane) * kPanel + block % kPanel] = means[lane];
    });
    if (block + 1 == op.blocks)
      for (int64_t d = 0; d < padded(op.width); d++)
        for (int64_t column = op.blocks % kPanel; column % kPanel; column++) panel[d * kPanel + column] = 0;
  }
}

void nabla_select(const NablaSelection& op, int64_t item, float* scratch) {
  const int64_t pieces = selection_pieces(op.blocks), head = item / pieces;
  const int64_t wide = padded(op.width), step = logits_step(op.blocks);
  const int64_t end = smaller(op.blocks, (item % pieces + 1) * kSelectedRows);
  int64_t clip = 0;
  for (int64_t first = item % pieces * kSelectedRows; first < end;) {
    while (op.clip_starts[clip + 1] <= first) clip++;
    const int64_t keys = op.clip_starts[clip], keys_end = op.clip_starts[clip + 1];
    const int64_t last = smaller(end, keys_end), first_panel = keys / kPanel;
    for (int64_t panel = first_panel; panel < panels_of(keys_end); panel++)
      dot_products(op.queries + (head * op.blocks + first) * wide, wide, last - first,
                   op.keys + (head * padded(op.blocks) + panel * kPanel) * wide, wide,
                   scratch + (panel - first_panel) * kPanel, step);
    for (int64_t block = first; block < last; block++) {
      float* logits = scratch + (block - first) * step + keys % kPanel;
      const int64_t number = head * op.blocks + block;
      const Row row{logits, keys_end - keys, op.bits + number * op.row_words};
      select_from_logits(logits, row, op.scale * 1.44269504f, op.dropped_mass, scratch + kSelectedRows * step);
      if (op.near_offsets)
        for (int64_t entry = op.near_offsets[block]; entry < op.near_offsets[block + 1]; entry++)
          keep(row, op.near_indices[entry] - keys);
      op.counts[number] = 0;
      for (int64_t word = 0; word < words_of(row); word++) op.counts[number] += __builtin_popcountll(row.bits[word]);
    }
    first = last;
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

template void pool_queries(const BlockMeans<float>&, int64_t, int64_t);
template void pool_queries(const BlockMeans<BFloat16>&, int64_t, int64_t);
template void pool_keys(const BlockMeans<float>&, int64_t, int64_t);
template void pool_keys(const BlockMeans<BFloat16>&, int64_t, int64_t);

}  // namespace k5::K5_ISA
