// Memory of a kernel's own. std::vector would not do: every instruction set's build instantiates its functions, and the
// linker keeps one copy for all (isa.h).
#pragma once

#include <cstdint>

namespace k5 {
namespace {

// An array of zeros.
struct ZeroedFloats {
  explicit ZeroedFloats(int64_t size) : data(new float[size]()) {}
  ~ZeroedFloats() { delete[] data; }
  ZeroedFloats(const ZeroedFloats&) = delete;
  ZeroedFloats& operator=(const ZeroedFloats&) = delete;
  float* const data;
};

}  // namespace
}  // namespace k5
