// Which instruction set a kernel runs with. Every csrc/cpu/X.cpp is compiled once for each: K5_ISA names the
// namespace its code goes to. Nothing else in those files may have external linkage, inline functions and templates of
// the standard library included: the linker would merge the two builds' copies.
#pragma once

namespace k5 {

// avx512_bf16 has a build of attention of its own, with another kernel for its forward in bfloat16; everything else
// runs as avx2 there.
enum class Isa : int { portable = 0, avx2 = 1, avx512_bf16 = 2 };

// The best one this processor runs, unless one was forced.
Isa current_isa();

// Force one (tests, bug reports); false where this build or this processor lacks it.
bool force_isa(Isa isa);

}  // namespace k5

#ifdef K5_HAS_AVX2
#define K5_DISPATCH(function, ...) \
  (k5::current_isa() >= k5::Isa::avx2 ? k5::avx2::function(__VA_ARGS__) : k5::portable::function(__VA_ARGS__))
#else
#define K5_DISPATCH(function, ...) k5::portable::function(__VA_ARGS__)
#endif

// For the files that are built for AVX-512 too.
#ifdef K5_HAS_AVX512_BF16
#define K5_DISPATCH_AVX512(function, ...)                                                    \
  (k5::current_isa() == k5::Isa::avx512_bf16 ? k5::avx512_bf16::function(__VA_ARGS__)      \
                                             : K5_DISPATCH(function, __VA_ARGS__))
#else
#define K5_DISPATCH_AVX512(function, ...) K5_DISPATCH(function, __VA_ARGS__)
#endif
