// Multiplications and additions of float32 in registers alone, as fast as the cores do them.
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kSums = 12;  // more than a core has under way, and what registers hold beside factor and term

typedef float Lanes __attribute__((vector_size(4 * kLanes)));

// Sums of a thread.
extern "C" int sums_of_thread() { return kSums * kLanes; }

// Does sum = sum · factor + term `steps` times with each of the [threads, sums_of_thread()] in memory. They start from
// memory so that the compiler cannot see that they are alike and one would do. PyTorch's threads do it: others would
// have to share the cores with them, which spin for a while after each parallel loop.
extern "C" void multiply_and_add(int64_t threads, int64_t steps, float factor, float term, float* memory) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t thread = 0; thread < threads; thread++) {
    float* own = memory + thread * sums_of_thread();
    Lanes sums[kSums];
    std::memcpy(sums, own, sizeof(sums));
    for (int64_t step = 0; step < steps; step++)
#pragma GCC unroll 12
      for (int i = 0; i < kSums; i++) sums[i] = sums[i] * factor + term;
    std::memcpy(own, sums, sizeof(sums));
  }
}
