// Binds the convolution of the VAE.
#include <algorithm>

#include "binding.h"
#include "cpu/tile.h"
#include "cpu/winograd_conv3d.h"

namespace {

using namespace k5::binding;
using torch::headeronly::MemoryFormat;

// Frames and tiles of a block: enough of both together that a filter, once read, is used often, few enough that a
// block's values stay in the caches.
constexpr int64_t kBlockFrames = 4, kTransformed = 144;
// Where blocks are fewer than this, they are cut along the channels, to no fewer than that: a small frame would else be
// one thread's work, and that thread read all filters. Constants, so that nothing depends on the number of threads.
constexpr int64_t kBlocks = 8, kBlockChannels = 128;

// The fewest parts that channels_out can be cut in, of at least kBlockChannels, so that there are kBlocks blocks.
int64_t channel_parts(int64_t channels_out, int64_t blocks) {
  int64_t parts = 1;
  while (blocks * parts < kBlocks && channels_out % (2 * parts * k5::kPanel) == 0 &&
         channels_out / (2 * parts) >= kBlockChannels)
    parts *= 2;
  return parts;
}

Tensor winograd_conv3d(const Tensor& x, const Tensor& filters, const Tensor& bias) {
  const Tensor dense = contiguous(x, MemoryFormat::ChannelsLast3d), dense_filters = contiguous(filters);
  const Tensor dense_bias = dense_float(bias);
  const int64_t batch = x.size(0), frames = x.size(2) - 2, height = x.size(3) - 2, width = x.size(4) - 2;
  const int64_t channels_out = bias.size(0), sizes[] = {batch, channels_out, frames, height, width};
  Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                    MemoryFormat::ChannelsLast3d);
  if (out.numel() == 0) return out;
  const float *from = data<float>(dense), *transformed = data<float>(dense_filters), *added = data<float>(dense_bias);
  k5::WinogradConv3d op{from, transformed, added, mutable_data<float>(out), frames, height, width, x.size(1),
                        channels_out, 0, 0, 0};
  op.tiles = std::min(kTransformed / (std::min(frames, kBlockFrames) + k5::kTaps - 1), op.tiles_of_frame());
  op.block_frames = std::min(frames, std::max<int64_t>(kBlockFrames, kTransformed / op.tiles - (k5::kTaps - 1)));
  const int64_t blocks = batch * op.frame_blocks() * op.tile_blocks();
  op.block_channels = channels_out / channel_parts(channels_out, blocks);
  for_items(blocks * op.channel_blocks(), op.scratch(),
            [&](int64_t block, float* scratch) { K5_DISPATCH(winograd_conv3d, op, block, scratch); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) { m.impl("winograd_conv3d", TORCH_BOX(&winograd_conv3d)); }
