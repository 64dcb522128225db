// The instruction sets of the kernels. Each csrc/cpu/X.cpp is compiled once for each of them, into the namespace
// K5_ISA. Nothing outside that namespace may have external linkage in these files, not even an inline function or a
// template of the standard library: the linker would keep one copy for all builds, and an older processor might run the
// wrong one.
#pragma once

namespace k5 {

// For avx512_bf16 only the files in AVX512_FILES of CMakeLists.txt are compiled; the other kernels run as avx2 there.
enum class Isa : int { portable = 0, avx2 = 1, avx512_bf16 = 2 };

// The best one that this processor has, or the one that was forced.
Isa current_isa();

// Forces one (for tests and bug reports); returns false where this build or this processor does not have it.
bool force_isa(Isa isa);

}  // namespace k5

#ifdef K5_HAS_AVX2
#define K5_DISPATCH(function, ...) \
  (k5::current_isa() >= k5::Isa::avx2 ? k5::avx2::function(__VA_ARGS__) : k5::portable::function(__VA_ARGS__))
#else
#define K5_DISPATCH(function, ...) k5::portable::function(__VA_ARGS__)
#endif

// For the kernels that are compiled for AVX-512 too.
#ifdef K5_HAS_AVX512_BF16
#define K5_DISPATCH_AVX512(function, ...)                                                    \
  (k5::current_isa() == k5::Isa::avx512_bf16 ? k5::avx512_bf16::function(__VA_ARGS__)      \
                                             : K5_DISPATCH(function, __VA_ARGS__))
#else
#define K5_DISPATCH_AVX512(function, ...) K5_DISPATCH(function, __VA_ARGS__)
#endif
