#include "winograd_conv3d.h"

#include "tile.h"

namespace k5::K5_ISA {
namespace {

// The points that polynomials are multiplied at: 0, A, -A, B, -B and infinity. Against the usual 1 and 2 they halve the
// error; their powers are exact in binary.
constexpr float A = 0.625f, B = 1.5f, A2 = A * A, B2 = B * B, A3 = A2 * A, B3 = B2 * B;

// What the six inputs of a tile, in one direction, become.
K5_INLINE void transform_input(const Vec8 (&d)[6], Vec8 (&v)[6]) {
  const Vec8 even_a = d[4] - B2 * d[2], odd_a = A * (d[3] - B2 * d[1]);
  const Vec8 even_b = d[4] - A2 * d[2], odd_b = B * (d[3] - A2 * d[1]);
  v[0] = d[4] - (A2 + B2) * d[2] + (A2 * B2) * d[0];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = d[5] - (A2 + B2) * d[3] + (A2 * B2) * d[1];
}

// The four outputs of a tile, in one direction, from its six products.
K5_INLINE void transform_output(const Vec8 (&m)[6], Vec8 (&y)[4]) {
  const Vec8 sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = A * difference_a + B * difference_b;
  y[2] = A2 * sum_a + B2 * sum_b;
  y[3] = A3 * difference_a + B3 * difference_b + m[5];
}

// Products that are summed one after the other; such sums are added up. One sum of all 3 * channels_in would round
// more.
constexpr int64_t kSumLength = 64;

// Where a block stands.
struct Block {
  int64_t sample, first_frame, frames, first_tile, tiles, first_channel;
};

Block block_at(const WinogradConv3d& op, int64_t number) {
  const int64_t first_channel = number % op.channel_blocks() * op.block_channels, of_all = number / op.channel_blocks();
  const int64_t first_tile = of_all % op.tile_blocks() * op.tiles, rest = of_all / op.tile_blocks();
  const int64_t first_frame = rest % op.frame_blocks() * op.block_frames;
  return {rest / op.frame_blocks(), first_frame, smaller(op.block_frames, op.frames - first_frame), first_tile,
          smaller(op.tiles, op.tiles_of_frame() - first_tile), first_channel};
}

// inputs[plane][frame][tile][channel]: of all frames that the block's outputs need, the 36 points and the first value.
void transform_inputs(const WinogradConv3d& op, const Block& block, float* inputs) {
  const int64_t row_step = (op.width + 2) * op.channels_in, frame_step = (op.height + 2) * row_step;
  const int64_t frames = block.frames + kTaps - 1;
  for (int64_t frame = 0; frame < frames; frame++)
    for (int64_t i = 0; i < block.tiles; i++) {
      const int64_t tile = block.first_tile + i;
      const int64_t top = tile / op.tile_columns() * kWinogradTile, left = tile % op.tile_columns() * kWinogradTile;
      const float* from = op.x + (block.sample * (op.frames + 2) + block.first_frame + frame) * frame_step +
                          top * row_step + left * op.channels_in;
      const int64_t rows = smaller(kWinogradIn, op.height + 2 - top);
      const int64_t columns = smaller(kWinogradIn, op.width + 2 - left);
      float* to = inputs + (frame * block.tiles + i) * op.channels_in;
      for (int64_t channel = 0; channel < op.channels_in; channel += kLanes) {
        const Vec8 first = load(from + channel);
        store(to + 36 * op.input_step() + channel, first);
        Vec8 half[6][6];  // [column][transformed row]
        for (int64_t column = 0; column < 6; column++) {
          Vec8 d[6];
          for (int64_t row = 0; row < 6; row++) {
            const bool inside = row < rows && column < columns;
            d[row] = inside ? load(from + row * row_step + column * op.channels_in + channel) - first : Vec8{};
          }
          transform_input(d, half[column]);
        }
        for (int64_t row = 0; row < 6; row++) {
          const Vec8 d[6] = {half[0][row], half[1][row], half[2][row], half[3][row], half[4][row], half[5][row]};
          Vec8 v[6];
          transform_input(d, v);
          for (int64_t column = 0; column < 6; column++)
            store(to + (row * 6 + column) * op.input_step() + channel, v[column]);
        }
      }
    }
}

// outputs[plane][frame][tile][channel] = the sum over the taps and the channels of the products of that plane.
void multiply(const WinogradConv3d& op, const Block& block, const float* inputs, float* outputs) {
  const int64_t rows = block.frames * block.tiles, depth = op.channels_in;
  const int64_t tap_step = block.tiles * depth;
  for (int64_t plane = 0; plane < kWinogradPlanes; plane++)
    for (int64_t channel = 0; channel < op.block_channels; channel += kPanel) {
      const float* panel = op.filters + (plane * op.channels_out + block.first_channel + channel) * kTaps * depth;
      const float* from = inputs + plane * op.input_step();
      float* to = outputs + plane * op.output_step() + channel;
      for_tiles(rows, [&]<int Rows>(int64_t row) __attribute__((always_inline)) {
        bool first = true;
        for (int64_t tap = 0; tap < kTaps; tap++)
          for (int64_t k = 0; k < depth; k += kSumLength) {
            auto tile = Tile<Rows>::zero();
            Tile<Rows>::add_product(tile, from + row * depth + tap * tap_step + k, depth, 1,
                                    panel + (tap * depth + k) * kPanel, kPanel, smaller(kSumLength, depth - k));
            if (first)
              Tile<Rows>::write(tile, to + row * op.block_channels, op.block_channels);
            else
              Tile<Rows>::add_to(tile, to + row * op.block_channels, op.block_channels);
            first = false;
          }
      });
    }
}

void transform_outputs(const WinogradConv3d& op, const Block& block, const float* outputs) {
  const int64_t row_step = op.width * op.channels_out, frame_step = op.height * row_step;
  for (int64_t frame = 0; frame < block.frames; frame++)
    for (int64_t i = 0; i < block.tiles; i++) {
      const int64_t tile = block.first_tile + i;
      const int64_t top = tile / op.tile_columns() * kWinogradTile, left = tile % op.tile_columns() * kWinogradTile;
      const float* from = outputs + (frame * block.tiles + i) * op.block_channels;
      float* to = op.out + (block.sample * op.frames + block.first_frame + frame) * frame_step + top * row_step +
                  left * op.channels_out + block.first_channel;
      const int64_t rows = smaller(kWinogradTile, op.height - top), columns = smaller(kWinogradTile, op.width - left);
      for (int64_t channel = 0; channel < op.block_channels; channel += kLanes) {
        Vec8 half[6][4];  // [column][output row]
        for (int64_t column = 0; column < 6; column++) {
          Vec8 m[6];
          for (int64_t row = 0; row < 6; row++) m[row] = load(from + (row * 6 + column) * op.output_step() + channel);
          transform_output(m, half[column]);
        }
        const Vec8 bias = load(op.bias + block.first_channel + channel);
        const Vec8 of_all = load(from + 36 * op.output_step() + channel) + bias;
        for (int64_t row = 0; row < rows; row++) {
          const Vec8 m[6] = {half[0][row], half[1][row], half[2][row], half[3][row], half[4][row], half[5][row]};
          Vec8 y[4];
          transform_output(m, y);
          for (int64_t column = 0; column < columns; column++)
            store(to + row * row_step + column * op.channels_out + channel, y[column] + of_all);
        }
      }
    }
}

}  // namespace

void winograd_conv3d(const WinogradConv3d& op, int64_t number, float* scratch) {
  const Block block = block_at(op, number);
  float* outputs = scratch + kWinogradPlanes * op.input_step();
  transform_inputs(op, block, scratch);
  multiply(op, block, scratch, outputs);
  transform_outputs(op, block, outputs);
}

}  // namespace k5::K5_ISA
