// Binds the kernels of NABLA attention: the block mask, the attention over it and its gradients.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "binding.h"
#include "cpu/block_sparse_attention.h"
#include "cpu/nabla_mask.h"

namespace {

using namespace k5::binding;

template <class T>
k5::Heads<const T> heads_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
k5::Heads<T> new_heads(Tensor& tensor) {
  return {mutable_data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

k5::BlockLists lists_of(const Tensor& offsets, const int64_t* offset_data, const int32_t* index_data) {
  const int64_t rows = offsets.size(2), heads = offsets.size(1);
  return {offset_data, index_data, offsets.size(0) > 1 ? heads * rows : 0, heads > 1 ? rows : 0};
}

// Raises where the lists of a mask would make a kernel read out of bounds; a mask may have been built by hand.
void check_lists(const Tensor& offsets, const Tensor& indices, int64_t blocks) {
  const int64_t count = offsets.numel(), kept = indices.numel();
  const int64_t* ends = data<int64_t>(offsets);
  STD_TORCH_CHECK(count == 0 || (ends[0] == 0 && ends[count - 1] == kept && std::is_sorted(ends, ends + count)),
                  "mask: expected offsets that ascend from 0 to the ", kept, " indices there are");
  const int32_t* keys = data<int32_t>(indices);
  uint32_t largest = 0;  // unsigned, so that a negative index is larger than any block
  for (int64_t entry = 0; entry < kept; entry++) largest = std::max(largest, static_cast<uint32_t>(keys[entry]));
  STD_TORCH_CHECK(largest < blocks || kept == 0, "mask: expected indices of blocks, 0 to ", blocks - 1);
}

k5::AttentionSizes sizes_of(const Tensor& q, const Tensor& block_starts, double scale) {
  return {data<int64_t>(block_starts), q.size(1), block_starts.size(0) - 1, q.size(3), static_cast<float>(scale)};
}

template <class T>
void run_attention(const k5::Attention<T>& op, int64_t items) {
#ifdef K5_HAS_AVX512_BF16
  if constexpr (std::is_same_v<T, k5::BFloat16>)
    if (k5::current_isa() == k5::Isa::avx512_bf16) {
      for_items(items, k5::attention_bf16_scratch(op.sizes), [&](int64_t item, float* scratch) {
        k5::avx512_bf16::block_sparse_attention(op, item, scratch);
      });
      return;
    }
#endif
  for_items(items, k5::attention_scratch(op.sizes),
            [&](int64_t item, float* scratch) { K5_DISPATCH_AVX512(block_sparse_attention, op, item, scratch); });
}

std::tuple<Tensor, Tensor> block_sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& offsets, const Tensor& indices,
                                                  const Tensor& block_starts, int64_t max_block_tokens, double scale) {
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k), values = with_unit_stride(v);
  const Tensor list_offsets = contiguous(offsets), list_indices = contiguous(indices);
  const Tensor starts = contiguous(block_starts);
  check_lists(list_offsets, list_indices, starts.size(0) - 1);
  Tensor out = new_like(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const k5::AttentionSizes sizes = sizes_of(q, starts, scale);
  for_dtype("q, k and v", q, [&](auto element) {
    using T = decltype(element);
    const k5::Attention<T> op{
        sizes,
        heads_of<T>(queries),
        heads_of<T>(keys),
        heads_of<T>(values),
        new_heads<T>(out),
        new_heads<float>(lse),
        lists_of(list_offsets, data<int64_t>(list_offsets), data<int32_t>(list_indices))};
    run_attention(op, q.size(0) * q.size(1) * sizes.blocks);
  });
  return {out, lse};
}

// For each key block the query blocks that read it, ascending: a counting sort of each head's lists.
struct TransposedLists {
  TransposedLists(const Tensor& list_offsets, const Tensor& list_indices)
      : offsets(list_offsets.numel()), readers(list_indices.numel()) {
    const int64_t rows = list_offsets.size(2), blocks = rows - 1;
    const int64_t* reads = data<int64_t>(list_offsets);
    const int32_t* keys = data<int32_t>(list_indices);
    parallel_for(0, list_offsets.size(0) * list_offsets.size(1), 1, [&](int64_t first, int64_t end) {
      std::vector<int64_t> next(rows);
      for (int64_t head = first; head < end; head++) {
        const int64_t* row = reads + head * rows;
        int64_t* ends = offsets.data() + head * rows;
        std::fill(ends, ends + rows, 0);
        for (int64_t entry = row[0]; entry < row[blocks]; entry++) ends[keys[entry] + 1]++;
        ends[0] = row[0];
        for (int64_t key = 0; key < blocks; key++) ends[key + 1] += ends[key];
        std::copy(ends, ends + rows, next.begin());
        for (int64_t block = 0; block < blocks; block++)
          for (int64_t entry = row[block]; entry < row[block + 1]; entry++)
            readers[next[keys[entry]]++] = static_cast<int32_t>(block);
      }
    });
  }
  std::vector<int64_t> offsets;
  std::vector<int32_t> readers;
};

// Two schedules: `pieces` that compute five matrix products for each pair of blocks but are not divided among threads,
// or many small pieces that compute seven but keep all threads equally busy. Whether the first takes no longer.
bool shares_are_faster(int64_t pieces, int64_t threads) {
  const int64_t turns = (pieces + threads - 1) / threads;
  return 5 * turns * threads <= 7 * pieces;
}

// The two schedules of AttentionBackward.
template <class T>
void run_attention_backward(const k5::AttentionBackward<T>& op, int64_t heads) {
  const int64_t scratch_floats = k5::attention_backward_scratch(op.sizes), blocks = heads * op.sizes.blocks;
  const int64_t part = k5::attention_grad_q_part(op.sizes);
  const auto add_parts = [&](int64_t item, float* scratch, const float* parts) {
    K5_DISPATCH_AVX512(add_grad_q_parts, op, item, scratch, parts);
  };
  if (!shares_are_faster(heads * op.shares, torch::stable::get_num_threads())) {
    for_items(blocks, scratch_floats,
              [&](int64_t item, float* scratch) { K5_DISPATCH_AVX512(key_block_gradients, op, item, scratch); });
    for_items(blocks, scratch_floats,
              [&](int64_t item, float* scratch) { K5_DISPATCH_AVX512(query_block_gradient, op, item, scratch); });
  } else if (op.shares == 1) {  // many heads: each thread reuses one part instead of one for each head
    for_items(heads, scratch_floats + part, [&](int64_t head, float* scratch) {
      K5_DISPATCH_AVX512(share_gradients, op, head, scratch + part, scratch);
      for (int64_t block = 0; block < op.sizes.blocks; block++)
        add_parts(head * op.sizes.blocks + block, scratch + part, scratch);
    });
  } else {
    const AlignedFloats parts(heads * op.shares * part);
    for_items(heads * op.shares, scratch_floats, [&](int64_t item, float* scratch) {
      K5_DISPATCH_AVX512(share_gradients, op, item, scratch, parts.data() + item * part);
    });
    for_items(blocks, scratch_floats, [&](int64_t item, float* scratch) {
      add_parts(item, scratch, parts.data() + item / op.sizes.blocks * op.shares * part);
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> block_sparse_attention_backward(
    const Tensor& grad_out, std::optional<Tensor> grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& offsets, const Tensor& indices, const Tensor& block_starts,
    int64_t max_block_tokens, double scale) {
  const Tensor grads = with_unit_stride(grad_out), outs = with_unit_stride(out);
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k), values = with_unit_stride(v);
  const Tensor list_offsets = contiguous(offsets), list_indices = contiguous(indices);
  const Tensor starts = contiguous(block_starts), dense_lse = contiguous(lse);
  check_lists(list_offsets, list_indices, starts.size(0) - 1);
  const TransposedLists transposed(list_offsets, list_indices);
  Tensor shift = new_like(dense_lse), base = new_like(dense_lse);
  Tensor grad_q = new_like(q), grad_k = new_like(k), grad_v = new_like(v);
  const k5::AttentionSizes sizes = sizes_of(q, starts, scale);
  const k5::Heads<const float> lse_gradient =
      grad_lse ? heads_of<float>(*grad_lse) : k5::Heads<const float>{nullptr, 0, 0, 0};
  for_dtype("q, k and v", q, [&](auto element) {
    using T = decltype(element);
    const k5::AttentionBackward<T> op{
        sizes,
        heads_of<T>(queries),
        heads_of<T>(keys),
        heads_of<T>(values),
        heads_of<T>(grads),
        heads_of<float>(base),
        heads_of<float>(shift),
        new_heads<T>(grad_q),
        new_heads<T>(grad_k),
        new_heads<T>(grad_v),
        lists_of(list_offsets, data<int64_t>(list_offsets), data<int32_t>(list_indices)),
        lists_of(list_offsets, transposed.offsets.data(), transposed.readers.data()),
        k5::shares_of_a_head(q.size(0) * q.size(1))};
    const k5::AttentionSaved<T> saved{
        sizes,       heads_of<T>(outs), op.grad_out, lse_gradient, data<float>(dense_lse), mutable_data<float>(shift),
        mutable_data<float>(base)};
    parallel_for(0, shift.numel(), grain(sizes.width), [&](int64_t first, int64_t end) {
      K5_DISPATCH_AVX512(prepare_attention_backward, saved, first, end);
    });
    run_attention_backward(op, q.size(0) * q.size(1));
  });
  return {grad_q, grad_k, grad_v};
}

template <class T>
k5::BlockMeans<T> means_of(const Tensor& tensor, const Tensor& block_starts, const AlignedFloats& pooled) {
  return {data<T>(tensor),
          tensor.stride(0),
          tensor.stride(1),
          tensor.stride(2),
          data<int64_t>(block_starts),
          tensor.size(1),
          block_starts.size(0) - 1,
          tensor.size(3),
          pooled.data()};
}

std::tuple<Tensor, Tensor> nabla_mask(const Tensor& q, const Tensor& k, const Tensor& block_starts,
                                      const Tensor& clip_block_starts, int64_t max_block_tokens,
                                      int64_t max_clip_blocks, double thr, std::optional<Tensor> sta_offsets,
                                      std::optional<Tensor> sta_indices) {
  const Tensor queries = with_unit_stride(q), keys = with_unit_stride(k);
  const Tensor starts = contiguous(block_starts), clips = contiguous(clip_block_starts);
  const int64_t heads = q.size(0) * q.size(1), blocks = starts.size(0) - 1, width = q.size(3);
  const int64_t row_words = (max_clip_blocks + 63) / 64;
  std::vector<uint64_t> bits(heads * blocks * row_words);
  std::vector<int64_t> counts(heads * blocks);
  std::optional<Tensor> near_offsets, near_indices;
  if (sta_offsets && sta_indices) {
    near_offsets = contiguous(*sta_offsets);
    near_indices = contiguous(*sta_indices);
  }
  const k5::NablaSelection selection{
      data<int64_t>(clips),
      near_offsets ? data<int64_t>(*near_offsets) : nullptr,
      near_indices ? data<int32_t>(*near_indices) : nullptr,
      heads,
      blocks,
      row_words,
      static_cast<float>(1 / std::sqrt(static_cast<double>(width))),
      static_cast<float>(1 - thr),
      bits.data(),
      counts.data()};
  const AlignedFloats pooled_queries(2 * blocks * k5::padded(width));
  const AlignedFloats pooled_keys(2 * k5::padded(blocks) * k5::padded(width));
  for_dtype("q and k", q, [&](auto element) {
    using T = decltype(element);
    const auto query_means = means_of<T>(queries, starts, pooled_queries);
    const auto key_means = means_of<T>(keys, starts, pooled_keys);
    for_waves(heads + 1, k5::selection_pieces(blocks), k5::selection_scratch(blocks),
              [&](int64_t head, int64_t piece, float* scratch) {
                K5_DISPATCH(nabla_select, selection, query_means, key_means, head, piece, scratch);
              });
  });
  auto [offsets, entries] = offsets_from_counts(q, q.size(0), q.size(1), blocks, counts);
  Tensor indices = torch::stable::new_empty(q, {entries}, ScalarType::Int);
  const int64_t* offset_data = data<int64_t>(offsets);
  int32_t* index_data = mutable_data<int32_t>(indices);
  parallel_for(0, heads * blocks, grain(blocks), [&](int64_t first, int64_t end) {
    K5_DISPATCH(nabla_lists, selection, offset_data, index_data, first, end);
  });
  return {offsets, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("block_sparse_attention_backward", TORCH_BOX(&block_sparse_attention_backward));
  m.impl("nabla_mask", TORCH_BOX(&nabla_mask));
}
