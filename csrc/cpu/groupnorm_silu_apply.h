// GroupNorm by given statistics, then SiLU, for dense [batch, channels, positions] and dense channels-last
// [batch, positions, channels]; the result may have a border of copies of its outermost values.
#pragma once

#include <cstdint>

#include "wide_vec.h"

namespace k5 {

// mean and variance are [batch, groups]; weight and bias are dense float32 [channels]. past_caches: whether to write
// out by `stream` of vec.h.
template <class T>
struct GroupNormSiLU {
  const T* x;
  const double* mean;
  const double* variance;
  const float* weight;
  const float* bias;
  T* out;
  int64_t channels, positions, groups;
  float eps;
  bool past_caches;
};

constexpr int64_t kChannelRows = 3;

// The frames or rows [first, end) of the result that are copies of one of x.
struct Copies {
  int64_t first, end;
  int64_t count() const { return end - first; }
};

// Positions of x are [frames, height, width]. The border: copies of the first frame before it, and of the outermost
// rows and columns on both sides.
struct Border {
  int64_t frames, height, width;
  int64_t before, rows, columns;

  int64_t padded_frames() const { return before + frames; }
  int64_t padded_height() const { return height + 2 * rows; }
  int64_t padded_width() const { return width + 2 * columns; }

  Copies copies_of_frame(int64_t frame) const { return {frame == 0 ? 0 : before + frame, before + frame + 1}; }
  Copies copies_of_row(int64_t row) const {
    return {row == 0 ? 0 : rows + row, row == height - 1 ? padded_height() : rows + row + 1};
  }
};

static inline int64_t clamp_to(int64_t place, int64_t size) { return place < 0 ? 0 : place < size ? place : size - 1; }

// A row of the result, by its place in a sample. The rows are numbered over their frames and samples.
struct PaddedRow {
  int64_t sample, frame, row;

  static PaddedRow at(const Border& border, int64_t number) {
    const int64_t frames = number / border.padded_height();
    return {frames / border.padded_frames(), frames % border.padded_frames(), number % border.padded_height()};
  }

  // The row that follows.
  void advance(const Border& border) {
    if (++row < border.padded_height()) return;
    row = 0;
    if (++frame < border.padded_frames()) return;
    frame = 0;
    sample++;
  }

  // The row of the sample in x that this one is of.
  int64_t source(const Border& border) const {
    return clamp_to(frame - border.before, border.frames) * border.height + clamp_to(row - border.rows, border.height);
  }
};

#define K5_DECLARE_GROUPNORM_SILU_APPLY(isa)                                                                    \
  namespace isa {                                                                                               \
  /* Contiguous: whole groups, numbered batch * groups + group. */                                              \
  template <class T>                                                                                            \
  void groupnorm_silu_contiguous(const GroupNormSiLU<T>& op, int64_t first_group, int64_t end_group);           \
  /* Channels-last, step 1, samples: of each sample kChannelRows rows of `whole_sixteens(channels)` floats, in  \
     the order of a row of T: the channels' means, weight / deviation, and biases, the last two as `silu` of    \
     silu.h takes them. */                                                                                      \
  template <class T>                                                                                            \
  void groupnorm_silu_channels(const GroupNormSiLU<T>& op, float* channels, int64_t first_sample,               \
                               int64_t end_sample);                                                             \
  /* Channels-last, step 2: positions, numbered over the whole batch. */                                        \
  template <class T>                                                                                            \
  void groupnorm_silu_channels_last(const GroupNormSiLU<T>& op, const float* channels, int64_t first_position,  \
                                    int64_t end_position);                                                      \
  /* Contiguous, with a border: rows of the result, numbered ((sample * channels + channel) * padded_frames +   \
     frame) * padded_height + row. */                                                                           \
  template <class T>                                                                                            \
  void groupnorm_silu_padded_contiguous(const GroupNormSiLU<T>& op, const Border& border, int64_t first_row,    \
                                        int64_t end_row);                                                       \
  /* Channels-last, with a border, step 2: rows of x with all their copies, numbered (sample * frames + frame)  \
     * height + row. */                                                                                         \
  template <class T>                                                                                            \
  void groupnorm_silu_padded_channels_last(const GroupNormSiLU<T>& op, const Border& border,                    \
                                           const float* channels, int64_t first_row, int64_t end_row);          \
  }
K5_DECLARE_GROUPNORM_SILU_APPLY(portable)
K5_DECLARE_GROUPNORM_SILU_APPLY(avx2)
K5_DECLARE_GROUPNORM_SILU_APPLY(avx512_bf16)
#undef K5_DECLARE_GROUPNORM_SILU_APPLY

}  // namespace k5
