// Binds what depends on the token layout alone: fractal order and the Sliding-Tile Attention mask.
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/fractal.h"
#include "cpu/sta_mask.h"

namespace {

using namespace k5::binding;

// Whether each sample is contiguous. There may be gaps between samples, as in a clip cut from a longer sequence.
bool dense_samples(const Tensor& tensor) {
  int64_t step = 1;
  for (int64_t axis = tensor.dim() - 1; axis > 0; axis--) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != step) return false;
    step *= tensor.size(axis);
  }
  return true;
}

struct Grid {
  int64_t frames, height, width;
};

// token_axis: the first of the axes that are inside a token.
Tensor fractal_copy(const Tensor& x, std::vector<int64_t> shape, int64_t token_axis, const Grid& grid,
                    int64_t block_side, bool to_fractal) {
  int64_t token_bytes = x.element_size();
  for (int64_t axis = token_axis; axis < x.dim(); axis++) {
    shape.push_back(x.size(axis));
    token_bytes *= x.size(axis);
  }
  Tensor out = torch::stable::new_empty(x, shape);
  if (out.numel() == 0) return out;
  const Tensor source = dense_samples(x) ? x : contiguous(x);
  const k5::FractalCopy op{static_cast<const char*>(source.const_data_ptr()),
                           static_cast<char*>(out.mutable_data_ptr()),
                           grid.frames,
                           grid.height,
                           grid.width,
                           block_side,
                           token_bytes,
                           source.stride(0) * static_cast<int64_t>(x.element_size()),
                           to_fractal};
  parallel_for(0, x.size(0) * grid.frames * grid.height, grain(grid.width * token_bytes / 4),
               [&](int64_t first, int64_t end) { K5_DISPATCH(fractal_copy, op, first, end); });
  return out;
}

Tensor fractal_flatten(const Tensor& x, int64_t block_side) {
  const Grid grid{x.size(1), x.size(2), x.size(3)};
  return fractal_copy(x, {x.size(0), grid.frames * grid.height * grid.width}, 4, grid, block_side, true);
}

Tensor fractal_unflatten(const Tensor& x, int64_t frames, int64_t height, int64_t width, int64_t block_side) {
  return fractal_copy(x, {x.size(0), frames, height, width}, 2, {frames, height, width}, block_side, false);
}

std::tuple<Tensor, Tensor> sta_mask(const Tensor& block_coordinates, std::vector<int64_t> window, int64_t kept) {
  const Tensor coordinates = contiguous(block_coordinates);
  const int64_t blocks = coordinates.size(0);
  const k5::StaWindow op{data<int64_t>(coordinates), blocks, {window[0] / 2, window[1] / 2, window[2] / 2}};
  std::vector<int64_t> counts(blocks);
  parallel_for(0, blocks, 64,
               [&](int64_t first, int64_t end) { K5_DISPATCH(sta_counts, op, counts.data(), first, end); });
  auto [offsets, entries] = offsets_from_counts(coordinates, 1, 1, blocks, counts);
  STD_TORCH_CHECK(entries == kept, "kept: expected the ", entries, " blocks that the window keeps, got ", kept);
  Tensor indices = torch::stable::new_empty(coordinates, {kept}, ScalarType::Int);
  const int64_t* offset_data = data<int64_t>(offsets);
  int32_t* index_data = mutable_data<int32_t>(indices);
  parallel_for(0, blocks, 64, [&](int64_t first, int64_t end) {
    K5_DISPATCH(sta_lists, op, offset_data, index_data, first, end);
  });
  return {offsets, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("fractal_flatten", TORCH_BOX(&fractal_flatten));
  m.impl("fractal_unflatten", TORCH_BOX(&fractal_unflatten));
  m.impl("sta_mask", TORCH_BOX(&sta_mask));
}
