// Rows with copies of their ends on both sides, one after the other in memory, cut into whole cache lines. Everything
// here is inlined, for the reason in isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace k5 {
namespace {

// What stands where one padded row ends and the next begins: the first row's last line, copies of its last value and of
// the second row's first one, and the second row's first line.
template <class T>
class Seam {
 public:
  static constexpr int64_t kLine = 64 / sizeof(T), kMostColumns = kLine / 2;

  void join(const T* row, const T* next, int64_t width, int64_t columns) {
    std::memcpy(values_, row + width - kLine, sizeof(T[kLine]));
    fill(values_ + kLine, row[width - 1]);
    fill(values_ + kLine + columns, next[0]);
    std::memcpy(values_ + kLine + 2 * columns, next, sizeof(T[kLine]));
  }

  // The line that begins so many values before or after the first row's copies end.
  const T* from_end(int64_t place, int64_t columns) const { return values_ + kLine + columns + place; }

 private:
  // Whole lines; what is too much is written over.
  static void fill(T* target, T value) {
    for (int64_t i = 0; i < kLine; i++) target[i] = value;
  }

  T values_[2 * kLine + 2 * kMostColumns];
};

// Whether `for_lines_of_padded_rows` takes such rows.
template <class T>
inline bool has_whole_lines(int64_t width, int64_t columns) {
  return width >= Seam<T>::kLine && columns <= Seam<T>::kMostColumns;
}

// For `rows` padded rows that follow each other at `out`; next_row() gives the inner values of one after the other.
// Calls whole(source, line) for each of their cache lines, with what it is computed from, or two(source, next_source,
// line) for it and the next one, and part(source, place, first, end) for a line that they share with their neighbours:
// values [first, end) of it belong at `place`.
template <class T, class NextRow, class Two, class Whole, class Part>
inline __attribute__((always_inline)) void for_lines_of_padded_rows(int64_t rows, int64_t width, int64_t columns,
                                                                    T* out, const NextRow& next_row, const Two& two,
                                                                    const Whole& whole, const Part& part) {
  constexpr int64_t kLine = Seam<T>::kLine;
  const int64_t padded = width + 2 * columns;
  Seam<T> seams[2];
  const T *x = next_row(), *next = x;
  seams[1].join(x, x, width, columns);
  int64_t begin = -static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T));  // of a line, in its row
  if (begin < 0) {
    part(seams[1].from_end(begin, columns), out, -begin, kLine);
    begin += kLine;
  }
  for (int64_t row = 0; row < rows; row++, out += padded, begin -= padded, x = next) {
    const bool is_last = row + 1 == rows;
    if (!is_last) next = next_row();
    const Seam<T>&before = seams[(row + 1) % 2], &after = seams[row % 2];
    seams[row % 2].join(x, next, width, columns);
    const int64_t end = is_last ? padded - kLine + 1 : padded;
    const auto source_of = [&](int64_t place) {
      // Chosen without a branch, which could not be foreseen: the compiler must not see that the loop falls into parts.
      asm("" : "+r"(place));
      const T* source = x + place - columns;
      source = place + kLine > columns + width ? after.from_end(place - padded, columns) : source;
      return place < columns ? before.from_end(place, columns) : source;
    };
    if constexpr (kTakesTwoPlaces)
      for (; begin + kLine < end; begin += 2 * kLine) two(source_of(begin), source_of(begin + kLine), out + begin);
    for (; begin < end; begin += kLine) whole(source_of(begin), out + begin);
    if (is_last && begin < padded) part(after.from_end(begin - padded, columns), out + begin, 0, padded - begin);
  }
}

}  // namespace
}  // namespace k5
