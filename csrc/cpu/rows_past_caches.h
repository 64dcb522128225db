// Rows of any width and alignment, written past the caches (`stream` of vec.h). Everything here is inlined, for the
// reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "prefetch.h"
#include "scratch.h"
#include "vec.h"

namespace k5 {
namespace {

// Writes rows that follow each other in memory: they are collected in the first-level cache and written in whole cache
// lines. Lines that the run shares with its neighbours are written through the caches.
template <class T>
class RowsPastCaches {
 public:
  RowsPastCaches(T* out, int64_t width)
      : width_(width),
        before_(reinterpret_cast<uintptr_t>(out) % kLineBytes / sizeof(T)),
        line_(out - before_),
        filled_(before_),
        values_(whole_lines(kCollected + width)) {}

  // Room for the next row.
  T* place() const { return values_.data + filled_; }

  void advance() {
    filled_ += width_;
    if (filled_ >= kCollected) write_lines();
  }

  // After the last row.
  void end() {
    write_lines();
    std::memcpy(line_ + before_, values_.data + before_, (filled_ - before_) * sizeof(T));
    end_of_stream();
  }

 private:
  static constexpr int64_t kLineBytes = 64, kLine = kLineBytes / sizeof(T);
  // Values that are written at a time: what is read back has by then left the processor's store queue.
  static constexpr int64_t kCollected = 4096 / sizeof(T);

  static int64_t whole_lines(int64_t values) { return (values + kLine - 1) / kLine * kLine; }

  void write_lines() {
    const int64_t whole = filled_ / kLine * kLine;
    prefetch_translation(line_, whole * sizeof(T));
    int64_t i = 0;
    if (before_ > 0 && whole > 0) {
      std::memcpy(line_ + before_, values_.data + before_, (kLine - before_) * sizeof(T));
      before_ = 0;
      i = kLine;
    }
    if (i < whole) stream_bytes(line_ + i, values_.data + i, (whole - i) * sizeof(T));
    std::memcpy(values_.data, values_.data + whole, (filled_ - whole) * sizeof(T));
    line_ += whole;
    filled_ -= whole;
  }

  const int64_t width_;
  int64_t before_;  // values of the first line that are not ours
  T* line_;         // where the first value collected goes
  int64_t filled_;
  const Zeroed<T> values_;
};

}  // namespace
}  // namespace k5
