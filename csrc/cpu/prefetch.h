// Prefetching while a kernel computes. Everything here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>

namespace k5 {
namespace {

// Levels of locality of __builtin_prefetch. kInOrder fetches into the first-level cache: when too many requests are
// outstanding, later ones wait, and so do the kernel's own loads. kMayDrop fetches into the second level only: when too
// many are outstanding, the request is dropped.
constexpr int kInOrder = 3, kMayDrop = 2;

constexpr int64_t kPageBytes = 4096;

// Positions of so many channels that are taken together, one channel after the other: what belongs to a channel stays
// in registers meanwhile. What is fetched for the next ones stays in the order of memory, which is faster.
template <class T>
inline int64_t positions_together(int64_t channels) {
  const int64_t in_page = kPageBytes / (channels * static_cast<int64_t>(sizeof(T)));
  return in_page > 0 ? in_page : 1;
}

// The cache lines that `count` values begin in; fewer than a line's are one.
template <class T>
inline __attribute__((always_inline)) void prefetch_values(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(values + i);
}

// To be called for each of the `bytes` after `place`, in the order of memory: once a page it fetches a line two pages
// further on, for the translation of that page's address. Else a write past the caches waits for the translation, and
// so do the hardware's own prefetches, which end with the page.
inline __attribute__((always_inline)) void prefetch_translation(const void* place, int64_t bytes) {
  if (static_cast<int64_t>(reinterpret_cast<uintptr_t>(place) % kPageBytes) < bytes)
    __builtin_prefetch(static_cast<const char*>(place) + 2 * kPageBytes);
}

// A queue of rows that are needed soon. They are prefetched a few cache lines at a time, between products: all at once
// they would delay the loads of the current computation.
class Prefetch {
 public:
  void clear() { *this = {}; }
  template <class T>
  void add(const T* first, int64_t step, int64_t count, int64_t width) {
    const int64_t bytes = width * int64_t(sizeof(T));
    if (count <= 0) return;
    queue_[queued_++] = {reinterpret_cast<const char*>(first), step * int64_t(sizeof(T)), bytes, count};
    lines_ += count * ((bytes + kLineBytes - 1) / kLineBytes);
  }
  // Sets the pace so that `calls` calls of next_lines fetch all that is queued.
  void spread_over(int64_t calls) { pace_ = (lines_ + calls - 1) / calls; }
  // The `before` of Tile::add_product: fetches at every kSteps-th k.
  __attribute__((always_inline)) void operator()(int64_t k) {
    if (k % kSteps == 0) next_lines();
  }
  static constexpr int64_t kSteps = 8;
  template <int Hint = kInOrder>
  __attribute__((always_inline)) void next_lines() {
    for (int64_t i = 0; i < pace_; i++) {
      if (line_ >= row_end_ && !next_row()) return;
      __builtin_prefetch(line_, 0, Hint);
      line_ += kLineBytes;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  struct Rows {
    const char* next;
    int64_t step, bytes, count;
  };
  __attribute__((always_inline)) bool next_row() {
    if (current_ == queued_) return false;
    Rows& rows = queue_[current_];
    line_ = rows.next;
    row_end_ = line_ + rows.bytes;
    rows.next += rows.step;
    if (--rows.count == 0) current_++;
    return true;
  }
  Rows queue_[4];
  int queued_ = 0, current_ = 0;
  int64_t lines_ = 0, pace_ = 0;
  const char *line_ = nullptr, *row_end_ = nullptr;
};

}  // namespace
}  // namespace k5
