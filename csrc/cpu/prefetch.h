// Memory that is read later, fetched while a kernel computes. Everything here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>

namespace k5 {
namespace {

// Rows that come up soon, fetched into the second-level cache a few at a time between products: all at once they would
// hold up the loads in work.
class Prefetch {
 public:
  template <class T>
  void add(const T* first, int64_t step, int64_t count, int64_t width) {
    if (count > 0)
      queue_[queued_++] = {reinterpret_cast<const char*>(first), step * int64_t(sizeof(T)), width * int64_t(sizeof(T)),
                           count};
  }
  void clear() { current_ = queued_ = 0; }
  void next_rows(int64_t count = 2) {
    for (int64_t row = 0; row < count && current_ < queued_; row++) {
      Rows& rows = queue_[current_];
      for (int64_t byte = 0; byte < rows.bytes; byte += kLineBytes) __builtin_prefetch(rows.next + byte, 0, 2);
      rows.next += rows.step;
      if (--rows.count == 0) current_++;
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  struct Rows {
    const char* next;
    int64_t step, bytes, count;
  };
  Rows queue_[4];
  int queued_ = 0, current_ = 0;
};

}  // namespace
}  // namespace k5
