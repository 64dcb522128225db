// Shared by the files that bind the kernels of csrc/cpu to the operators. k5kernels/ops defines the operators, in the
// library `k5_cpu`, and has checked the shapes. The bindings use PyTorch's stable ABI only, so that one binary works
// with several releases of torch.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace k5::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::contiguous;
using torch::stable::parallel_for;

// Rows that a thread takes at a time: enough work to be worth waking it.
inline int64_t grain(int64_t width) { return 1 + 16384 / (width + 1); }

// Calls `run` with a value of the tensor's element type; raises for dtypes that have no kernel.
template <class Run>
void for_dtype(const char* name, const Tensor& tensor, const Run& run) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, name,
                  ": expected float32 or bfloat16; other dtypes go through torch.ops.k5");
  if (dtype == ScalarType::Float) {
    run(float{});
  } else {
    run(k5::BFloat16{});
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor to_float(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

inline Tensor dense_float(const Tensor& tensor) { return contiguous(to_float(tensor)); }

inline bool unit_stride(const Tensor& tensor) { return tensor.stride(tensor.dim() - 1) == 1; }

inline Tensor with_unit_stride(const Tensor& tensor) { return unit_stride(tensor) ? tensor : contiguous(tensor); }

inline Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, tensor.sizes()); }

// Whether a result is larger than the second-level caches, so that a kernel should write it past them.
template <class T>
bool larger_than_caches(const Tensor& out) {
  constexpr int64_t kFewBytes = 4 << 20;
  return out.numel() * int64_t(sizeof(T)) >= kFewBytes;
}

// Whether a kernel should write rows of `width` values of this result past the caches, `values` at a time, which must
// be aligned.
template <class T>
bool past_caches(const Tensor& out, int64_t width, int64_t values = k5::kLanes) {
  return larger_than_caches<T>(out) && width % values == 0 &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % k5::kStreamBytes == 0;
}

// Uninitialized floats, aligned to a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t floats)
      : floats_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))) {}
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  ~AlignedFloats() { ::operator delete(floats_, std::align_val_t(64)); }
  float* data() const { return floats_; }

 private:
  float* floats_;
};

// Calls run(item, scratch) for every item. A thread that is free takes the next few items, fewer of them towards the
// end, so that items of different length keep all threads busy. Mostly a thread continues with the following item,
// whose data the kernels prefetch. Each thread has scratch memory of its own, `floats` floats.
template <class Run>
void for_items(int64_t items, int64_t floats, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), items);
  const auto few = [&](int64_t first) { return std::clamp<int64_t>((items - first) / (4 * workers), 1, 8); };
  parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const AlignedFloats scratch(floats);
    int64_t first = 0;
    while (first < items) {
      if (!next.compare_exchange_weak(first, first + few(first), std::memory_order_relaxed)) continue;
      const int64_t end = first + few(first);
      for (; first < end; first++) run(first, scratch.data());
    }
  });
}

// Calls run(first, end) for parts of `items`, each of `part` items or fewer; a thread that is free takes the next ones.
template <class Run>
void for_parts(int64_t items, int64_t part, const Run& run) {
  for_items((items + part - 1) / part, 0,
            [&](int64_t number, float*) { run(number * part, std::min(items, (number + 1) * part)); });
}

// Calls run(wave, item, scratch) for every item of every wave. An item starts when all items of the previous wave are
// done.
template <class Run>
void for_waves(int64_t waves, int64_t items, int64_t floats, const Run& run) {
  std::atomic<int64_t> next{0}, done{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), items);
  parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    const AlignedFloats scratch(floats);
    for (int64_t number; (number = next.fetch_add(1, std::memory_order_relaxed)) < waves * items;) {
      const int64_t wave = number / items;
      while (done.load(std::memory_order_acquire) < wave * items) std::this_thread::yield();
      run(wave, number % items, scratch.data());
      done.fetch_add(1, std::memory_order_release);
    }
  });
}

// Offsets [B, h, N_b + 1] of contiguous rows with these counts, and the number of entries of all rows.
inline std::tuple<Tensor, int64_t> offsets_from_counts(const Tensor& like, int64_t batch, int64_t heads, int64_t blocks,
                                                       const std::vector<int64_t>& counts) {
  Tensor offsets = torch::stable::new_empty(like, {batch, heads, blocks + 1}, ScalarType::Long);
  int64_t* next = mutable_data<int64_t>(offsets);
  int64_t entries = 0;
  for (int64_t head = 0; head < batch * heads; head++) {
    *next++ = entries;
    for (int64_t block = 0; block < blocks; block++) *next++ = entries += counts[head * blocks + block];
  }
  return {offsets, entries};
}

}  // namespace k5::binding
