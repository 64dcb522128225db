// What GroupNorm + SiLU in bfloat16 cannot do without, in bare loops: how fast they run is the limit of the kernels.
// For every value: from bfloat16 and back, a multiplication and an addition of its channel's numbers, one exponential
// of an argument that may be anything, one division. The gradient has three multiplications and two additions more; and
// the sums of each channel, or a multiplication and an addition with its sums. There are no groups, no differences from
// the mean, no rows that end, and no result is right where the statistics are extreme.
#include <cstdint>
#include <initializer_list>

#include "../csrc/cpu/lanes.h"
#include "../csrc/cpu/prefetch.h"

using namespace k5;
using T = BFloat16;

namespace {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int64_t kChannels = 128;
enum Row { kScale, kShift, kWeight, kLinear, kConstant };  // of `terms` [5, kChannels]

// silu(z), and grad * silu'(z) * ln(2), of scaled = -z * log2(e).
template <class V>
inline __attribute__((always_inline)) V bare_silu(V scaled) {
  return scaled / (rough_exp2<4>(scaled) * -kLog2e - kLog2e);
}
template <class V>
inline __attribute__((always_inline)) V bare_gradient(V grad, V scaled) {
  const V s = kLn2 / (rough_exp2<4>(scaled) + 1.0f);
  return (grad * s) * (scaled * (s - kLn2) + 1.0f);
}

// Lanes of neighbours that are computed together.
template <class Lanes>
struct One : OnePlace<Lanes> {
  auto arranged(const float* source) const { return Lanes{}.arranged(source); }
  template <class V>
  void set_arranged(float* target, V values) const {
    Lanes{}.set_arranged(target, values);
  }
};
template <class Lanes>
struct Two : TwoPlaces<Lanes> {
  Two() { this->apart = Lanes::kWidth; }
  auto arranged(const float* source) const {
    return Twice{Lanes{}.arranged(source), Lanes{}.arranged(source + Lanes::kWidth)};
  }
  template <class V>
  void set_arranged(float* target, Twice<V> values) const {
    Lanes{}.set_arranged(target, values.first);
    Lanes{}.set_arranged(target + Lanes::kWidth, values.second);
  }
};

// How a pass is run: the values it takes at a time; those it fetches ahead (0: none), and whether address translations
// too; whether it writes past the caches.
template <class Lanes_, int64_t kAhead_, bool kTranslations_, bool kPastCaches_>
struct Way {
  using Lanes = Lanes_;
  using V = decltype(Lanes{}.arranged(nullptr));
  static constexpr int64_t kWidth = Lanes::kWidth, kAhead = kAhead_;
  static constexpr bool kTranslations = kTranslations_, kPastCaches = kPastCaches_;
};

template <class W, class Visit>
inline __attribute__((always_inline)) void for_blocks(int64_t values, std::initializer_list<const T*> memory,
                                                      const Visit& visit) {
  for (int64_t first = 0; first < values; first += kChannels) {
    if (W::kTranslations)
      for (const T* place : memory) prefetch_translation(place + first, kChannels * sizeof(T));
    for (int64_t i = 0; i < kChannels; i += W::kWidth) visit(first + i, i, typename W::Lanes{});
  }
}

template <class W>
inline __attribute__((always_inline)) void fetch(const T* values) {
  if (W::kAhead > 0) prefetch_values(values + W::kAhead, W::kWidth);
}

// silu for `values`, then `copies` zeros: they stand for copies of results, which need not be computed again.
template <class W>
void forward(const float* terms, const T* x, T* out, int64_t values, int64_t copies) {
  const float scale = terms[0], shift = terms[kChannels];  // of one channel, the simplest case
  for_blocks<W>(values, {x, out}, [&](int64_t i, int64_t, auto lanes) {
    fetch<W>(x + i);
    lanes.template set<W::kPastCaches, Ties::away>(out + i, bare_silu(lanes.get(x + i) * scale + shift));
  });
  for_blocks<W>(copies, {out + values}, [&](int64_t i, int64_t, auto lanes) {
    lanes.template set<W::kPastCaches, Ties::away>(out + values + i, typename W::V{});
  });
  end_of_stream();
}

// The three passes of the backward: x and its square summed up; the gradient through SiLU and its product with x summed
// up for each channel; the gradient of x.
template <class W>
void statistics(const T* x, int64_t values, float* sums) {
  typename W::V total{}, square{};
  for_blocks<W>(values, {x}, [&](int64_t i, int64_t, auto lanes) {
    fetch<W>(x + i);
    const auto value = lanes.get(x + i);
    total = total + value;
    square = square + value * value;
  });
  alignas(64) float both[2][W::kWidth];
  typename W::Lanes{}.set_arranged(both[0], total);
  typename W::Lanes{}.set_arranged(both[1], square);
  for (int64_t i = 0; i < W::kWidth; i++) *sums += both[0][i] + both[1][i];
}

template <class W>
void gradient_sums(const float* terms, const T* grad, const T* x, int64_t values, float* sums) {
  alignas(64) float totals[kChannels] = {}, products[kChannels] = {};
  for_blocks<W>(values, {grad, x}, [&](int64_t i, int64_t channel, auto lanes) {
    fetch<W>(x + i);
    fetch<W>(grad + i);
    const auto term = [&](Row row) { return lanes.arranged(terms + row * kChannels + channel); };
    const auto value = lanes.get(x + i);
    const auto gradient = bare_gradient(lanes.get(grad + i), value * term(kScale) + term(kShift));
    lanes.set_arranged(totals + channel, lanes.arranged(totals + channel) + gradient);
    lanes.set_arranged(products + channel, lanes.arranged(products + channel) + gradient * value);
  });
  for (int64_t i = 0; i < kChannels; i++) *sums += (totals[i] + products[i]) * kLog2e;
}

template <class W>
void gradient(const float* terms, const T* grad, const T* x, T* out, int64_t values) {
  for_blocks<W>(values, {grad, x, out}, [&](int64_t i, int64_t channel, auto lanes) {
    fetch<W>(x + i);
    fetch<W>(grad + i);
    const auto term = [&](Row row) { return lanes.arranged(terms + row * kChannels + channel); };
    const auto value = lanes.get(x + i);
    const auto gradient = bare_gradient(lanes.get(grad + i), value * term(kScale) + term(kShift));
    lanes.template set<W::kPastCaches, Ties::away>(
        out + i, gradient * term(kWeight) - (value * term(kLinear) + term(kConstant)));
  });
  end_of_stream();
}

// Threads take the next part when they are free.
constexpr int64_t kPart = 1 << 16;  // values

template <class Run>
void for_parts(int64_t values, int64_t threads, const Run& run) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < values; first += kPart) run(first);
}

template <class W>
void forward_on_threads(const float* terms, const T* x, T* out, int64_t values, int64_t copies, int64_t threads) {
  const int64_t own_copies = copies / (values / kPart);
  for_parts(values, threads, [&](int64_t first) {
    forward<W>(terms, x + first, out + first + first / kPart * own_copies, kPart, own_copies);
  });
}

template <class W>
void backward_on_threads(const float* terms, const T* x, const T* grad, T* out, int64_t values, int64_t threads) {
  float sums = 0;
  const auto add = [&](float of_part) {
#pragma omp atomic
    sums += of_part;
  };
  for_parts(values, threads, [&](int64_t first) {
    float of_part = 0;
    statistics<W>(x + first, kPart, &of_part);
    add(of_part);
  });
  for_parts(values, threads, [&](int64_t first) {
    float of_part = 0;
    gradient_sums<W>(terms, grad + first, x + first, kPart, &of_part);
    add(of_part);
  });
  for_parts(values, threads, [&](int64_t first) {
    gradient<W>(terms, grad + first, x + first, out + first, kPart);
  });
}

struct Passes {
  void (*forward)(const float*, const T*, T*, int64_t, int64_t, int64_t);
  void (*backward)(const float*, const T*, const T*, T*, int64_t, int64_t);
};

template <class Lanes, int64_t kAhead, bool kTranslations, bool kPastCaches>
constexpr Passes passes_of = {forward_on_threads<Way<Lanes, kAhead, kTranslations, kPastCaches>>,
                              backward_on_threads<Way<Lanes, kAhead, kTranslations, kPastCaches>>};

constexpr Passes kWays[] = {
    passes_of<One<EvenOddThirtyTwo>, 0, false, true>,    passes_of<One<EvenOddThirtyTwo>, 512, false, true>,
    passes_of<One<EvenOddThirtyTwo>, 2048, false, true>, passes_of<One<EvenOddThirtyTwo>, 512, true, true>,
    passes_of<One<EvenOddThirtyTwo>, 2048, true, true>,  passes_of<Two<EvenOddThirtyTwo>, 0, false, true>,
    passes_of<Two<EvenOddThirtyTwo>, 512, true, true>,   passes_of<Two<EvenOddThirtyTwo>, 2048, true, true>,
    passes_of<One<AllSixteen>, 512, true, true>,         passes_of<One<EvenOddThirtyTwo>, 512, false, false>,
    passes_of<One<EvenOddThirtyTwo>, 512, true, false>};

}  // namespace

extern "C" int64_t silu_ways() { return sizeof(kWays) / sizeof(kWays[0]); }
extern "C" int64_t silu_channels() { return kChannels; }
extern "C" int64_t silu_part() { return kPart; }

// One run, in one of the ways, on PyTorch's threads. values: whole parts. x, grad: in memory that goes on for a while.
// out: for each part its values, then its share of the copies, whole kChannels; aligned to a cache line.
extern "C" void silu_forward(int64_t way, const float* terms, const T* x, T* out, int64_t values, int64_t copies,
                             int64_t threads) {
  kWays[way].forward(terms, x, out, values, copies, threads);
}
extern "C" void silu_backward(int64_t way, const float* terms, const T* x, const T* grad, T* out, int64_t values,
                              int64_t threads) {
  kWays[way].backward(terms, x, grad, out, values, threads);
}
