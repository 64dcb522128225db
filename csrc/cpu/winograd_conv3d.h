// A 3 x 3 x 3 convolution with unit strides by Winograd's F(4 x 4, 3 x 3) in height and width: 36 products for 16
// outputs in place of 144. The three frames that a filter spans are summed in the transformed domain, so that each
// frame is transformed once. In float32, for dense channels-last tensors.
//
// Before a tile is transformed its first value is taken from all of them; the convolution of that value alone, a 37th
// product, is added to all outputs. So where x does not vary in space the outputs do not either, to the last bit, as
// with the plain sum: a GroupNorm that follows would magnify what rounding makes of a flat frame.
#pragma once

#include <cstdint>

#include "vec.h"

namespace k5 {

constexpr int64_t kWinogradTile = 4, kWinogradIn = 6, kWinogradPlanes = 37, kTaps = 3, kPlaneGap = 16;

// x: [batch, frames + 2, height + 2, width + 2, channels_in]. filters: transformed, [37][channels_out / 16]
// [3 * channels_in][16]. out: [batch, frames, height, width, channels_out]. channels_in is a multiple of 8,
// channels_out of 16.
//
// A block is `tiles` tiles of 4 x 4 outputs, in row-major order, of `block_frames` frames, and `block_channels` of
// channels_out: a multiple of 16 that divides it.
struct WinogradConv3d {
  const float* x;
  const float* filters;
  const float* bias;
  float* out;
  int64_t frames, height, width, channels_in, channels_out;
  int64_t tiles, block_frames, block_channels;

  int64_t tile_columns() const { return (width + kWinogradTile - 1) / kWinogradTile; }
  int64_t tiles_of_frame() const { return (height + kWinogradTile - 1) / kWinogradTile * tile_columns(); }
  int64_t tile_blocks() const { return (tiles_of_frame() + tiles - 1) / tiles; }
  int64_t frame_blocks() const { return (frames + block_frames - 1) / block_frames; }
  int64_t channel_blocks() const { return channels_out / block_channels; }
  // Values of the block at one of the points, and a cache line between them and the next point's: without it the planes
  // would often stand a multiple of 4 KiB apart, and push each other out of the cache.
  int64_t input_step() const { return (block_frames + kTaps - 1) * tiles * channels_in + kPlaneGap; }
  int64_t output_step() const { return block_frames * tiles * block_channels + kPlaneGap; }
  int64_t scratch() const { return kWinogradPlanes * (input_step() + output_step()); }
};

// Block number ((sample * frame_blocks + frame block) * tile_blocks + tile block) * channel_blocks + channel block.
// scratch: scratch() floats.
namespace portable {
void winograd_conv3d(const WinogradConv3d& op, int64_t block, float* scratch);
}
namespace avx2 {
void winograd_conv3d(const WinogradConv3d& op, int64_t block, float* scratch);
}

}  // namespace k5
