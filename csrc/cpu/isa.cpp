#include "isa.h"

#include <atomic>

namespace k5 {
namespace {

Isa detect() {
#ifdef K5_HAS_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef K5_HAS_AVX512_BF16
  if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16"))
    return Isa::avx512_bf16;
#endif
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

const Isa kBest = detect();
std::atomic<Isa> chosen{kBest};

}  // namespace

Isa current_isa() { return chosen.load(std::memory_order_relaxed); }

bool force_isa(Isa isa) {
  if (isa > kBest) return false;
  chosen.store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace k5
