// Binds the choice of instruction set: k5kernels/info.py reports it, tests force it.
#include <string>

#include "binding.h"

namespace {

int64_t isa() { return static_cast<int64_t>(k5::current_isa()); }

bool force_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 2, "isa: expected 0 (portable), 1 (avx2) or 2 (avx512_bf16), got ", isa);
  return k5::force_isa(static_cast<k5::Isa>(isa));
}

// Names of the files of csrc/cpu, without suffix, that are built for AVX-512.
std::string avx512_files() { return K5_AVX512_FILES; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(k5_cpu, m) {
  m.def("isa() -> int");
  m.def("force_isa(int isa) -> bool");
  m.def("avx512_files() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("force_isa", TORCH_BOX(&force_isa));
  m.impl("avx512_files", TORCH_BOX(&avx512_files));
}
