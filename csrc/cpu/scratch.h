// Memory of a kernel's own. std::vector would not do: every instruction set's build instantiates its functions, and the
// linker keeps one copy for all (isa.h).
#pragma once

#include <cstdint>
#include <new>

namespace k5 {
namespace {

// An array of zeros, aligned to a cache line.
template <class T>
struct Zeroed {
  explicit Zeroed(int64_t size) : data(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {
    for (int64_t i = 0; i < size; i++) data[i] = T{};
  }
  ~Zeroed() { ::operator delete(data, std::align_val_t(64)); }
  Zeroed(const Zeroed&) = delete;
  Zeroed& operator=(const Zeroed&) = delete;
  T* const data;
};

using ZeroedFloats = Zeroed<float>;

}  // namespace
}  // namespace k5
