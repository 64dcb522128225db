// Binds the elementwise and normalization kernels of csrc/cpu.
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/gated_residual.h"
#include "cpu/groupnorm_silu_apply.h"
#include "cpu/groupnorm_statistics.h"
#include "cpu/layernorm_modulate.h"
#include "cpu/qk_norm_rope.h"

namespace {

using namespace k5::binding;
using torch::headeronly::MemoryFormat;

// A modulation in float32 with unit stride along the width: [B * clips, d] or [B, S, d].
Tensor modulation_rows(const Tensor& modulation) { return with_unit_stride(to_float(modulation)); }

// How the kernels walk `rows`, a result of modulation_rows that must outlive it.
k5::Modulation modulation_of(const Tensor& rows, int64_t clips) {
  const int64_t stride = rows.stride(0);
  if (rows.dim() == 3) return {data<float>(rows), stride, 0, rows.stride(1)};
  return {data<float>(rows), clips * stride, stride, 0};
}

Tensor layernorm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps,
                          std::vector<int64_t> clip_starts) {
  const int64_t clips = clip_starts.size() - 1;
  const Tensor dense = contiguous(x), shift_rows = modulation_rows(shift), scale_rows = modulation_rows(scale);
  Tensor out = new_like(x);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const k5::LayerNormModulate<T> op{
        data<T>(dense),
        modulation_of(shift_rows, clips),
        modulation_of(scale_rows, clips),
        mutable_data<T>(out),
        {clip_starts.data(), x.size(1)},
        x.size(2),
        static_cast<float>(eps)};
    parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)), [&](int64_t first, int64_t end) {
      K5_DISPATCH(layernorm_modulate, op, first, end);
    });
  });
  return out;
}

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, std::vector<int64_t> clip_starts) {
  const Tensor dense_x = contiguous(x), gate_rows = modulation_rows(gate);
  const Tensor dense_y = y.scalar_type() == ScalarType::BFloat16 ? contiguous(y) : dense_float(y);
  Tensor out = new_like(x);
  for_dtype("x", x, [&](auto x_element) {
    for_dtype("y", dense_y, [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      const k5::GatedResidual<X, Y> op{
          data<X>(dense_x),
          data<Y>(dense_y),
          modulation_of(gate_rows, clip_starts.size() - 1),
          mutable_data<X>(out),
          {clip_starts.data(), x.size(1)},
          x.size(2)};
      parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)), [&](int64_t first, int64_t end) {
        K5_DISPATCH(gated_residual, op, first, end);
      });
    });
  });
  return out;
}

Tensor norm_rope(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor strided = with_unit_stride(x);
  Tensor out = new_like(x);
  for_dtype("q and k", x, [&](auto element) {
    using T = decltype(element);
    const k5::NormRope<T> op{
        data<T>(strided),
        data<float>(weight),
        data<float>(cos),
        data<float>(sin),
        mutable_data<T>(out),
        x.size(1),
        x.size(2),
        x.size(3),
        strided.stride(0),
        strided.stride(1),
        strided.stride(2),
        static_cast<float>(eps)};
    parallel_for(0, x.size(0) * x.size(1), grain(x.size(2) * x.size(3)), [&](int64_t first, int64_t end) {
      K5_DISPATCH(norm_rope, op, first, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                        const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor dense_cos = dense_float(cos), dense_sin = dense_float(sin);
  return {norm_rope(q, dense_float(q_weight), dense_cos, dense_sin, eps),
          norm_rope(k, dense_float(k_weight), dense_cos, dense_sin, eps)};
}

// The format of the result, by the rule in k5kernels/ops/groupnorm_statistics.py.
MemoryFormat groupnorm_format(const Tensor& x) {
  const bool channels_innermost = !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1;
  if (channels_innermost && x.dim() == 4) return MemoryFormat::ChannelsLast;
  if (channels_innermost && x.dim() == 5) return MemoryFormat::ChannelsLast3d;
  return MemoryFormat::Contiguous;
}

// The arguments of the kernels; x and out are dense in the format of the result.
template <class T>
k5::GroupNormStatistics<T> statistics_of(const Tensor& x, double* mean, double* variance, int64_t groups) {
  return {data<T>(x), mean, variance, x.size(1), x.numel() / (x.size(0) * x.size(1)), groups};
}

template <class T>
k5::GroupNormSiLU<T> silu_of(const Tensor& x, const double* mean, const double* variance, const Tensor& weight,
                             const Tensor& bias, Tensor& out, int64_t groups, double eps) {
  return {data<T>(x),
          mean,
          variance,
          data<float>(weight),
          data<float>(bias),
          mutable_data<T>(out),
          x.size(1),
          x.numel() / (x.size(0) * x.size(1)),
          groups,
          static_cast<float>(eps)};
}

template <class T>
void statistics_channels_last(const k5::GroupNormStatistics<T>& op, int64_t batch) {
  const int64_t chunks = batch * k5::chunks_of(op.positions);
  std::vector<float> partial(2 * chunks * op.channels);
  parallel_for(0, chunks, grain(k5::kChunkPositions * op.channels), [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_statistics_of_chunks, op, partial.data(), first, end);
  });
  parallel_for(0, batch, 1, [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_statistics_merge, op, partial.data(), first, end);
  });
}

template <class T>
void silu_channels_last(const k5::GroupNormSiLU<T>& op, int64_t batch) {
  std::vector<float> centres_slopes(2 * batch * op.channels);
  parallel_for(0, batch, 1, [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_silu_slopes, op, centres_slopes.data(), first, end);
  });
  parallel_for(0, batch * op.positions, grain(op.channels), [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_silu_channels_last, op, centres_slopes.data(), first, end);
  });
}

std::tuple<Tensor, Tensor> groupnorm_statistics(const Tensor& x, int64_t groups) {
  const int64_t batch = x.size(0);
  Tensor mean = torch::stable::new_empty(x, {batch, groups}, ScalarType::Double), variance = new_like(mean);
  if (x.numel() == 0) {
    std::fill_n(mutable_data<double>(mean), batch * groups, 0.0);
    std::fill_n(mutable_data<double>(variance), batch * groups, 0.0);
    return {mean, variance};
  }
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const auto op = statistics_of<T>(dense, mutable_data<double>(mean), mutable_data<double>(variance), groups);
    if (format == MemoryFormat::Contiguous) {
      parallel_for(0, batch * groups, grain(x.numel() / (batch * groups)), [&](int64_t first, int64_t end) {
        K5_DISPATCH(groupnorm_statistics_contiguous, op, first, end);
      });
    } else {
      statistics_channels_last(op, batch);
    }
  });
  return {mean, variance};
}

Tensor groupnorm_silu_apply(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                            const Tensor& bias, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  const Tensor dense_mean = contiguous(mean), dense_variance = contiguous(variance);
  Tensor out = torch::stable::empty_like(dense);
  if (x.numel() == 0) return out;
  const int64_t batch = x.size(0), groups = mean.size(1);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const auto op = silu_of<T>(dense, data<double>(dense_mean), data<double>(dense_variance), dense_weight, dense_bias,
                               out, groups, eps);
    if (format == MemoryFormat::Contiguous) {
      parallel_for(0, batch * groups, grain(x.numel() / (batch * groups)), [&](int64_t first, int64_t end) {
        K5_DISPATCH(groupnorm_silu_contiguous, op, first, end);
      });
    } else {
      silu_channels_last(op, batch);
    }
  });
  return out;
}

// The two above in one call; where x is contiguous, each group is normalized while its values are still in the cache.
Tensor groupnorm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  Tensor out = torch::stable::empty_like(dense);
  if (x.numel() == 0) return out;
  const int64_t batch = x.size(0);
  std::vector<double> mean(batch * groups), variance(batch * groups);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const auto statistics = statistics_of<T>(dense, mean.data(), variance.data(), groups);
    const auto silu = silu_of<T>(dense, mean.data(), variance.data(), dense_weight, dense_bias, out, groups, eps);
    if (format == MemoryFormat::Contiguous) {
      parallel_for(0, batch * groups, grain(x.numel() / (batch * groups)), [&](int64_t first, int64_t end) {
        for (int64_t group = first; group < end; group++) {
          K5_DISPATCH(groupnorm_statistics_contiguous, statistics, group, group + 1);
          K5_DISPATCH(groupnorm_silu_contiguous, silu, group, group + 1);
        }
      });
    } else {
      statistics_channels_last(statistics, batch);
      silu_channels_last(silu, batch);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("groupnorm_silu", TORCH_BOX(&groupnorm_silu));
  m.impl("groupnorm_silu_apply", TORCH_BOX(&groupnorm_silu_apply));
  m.impl("groupnorm_statistics", TORCH_BOX(&groupnorm_statistics));
  m.impl("layernorm_modulate", TORCH_BOX(&layernorm_modulate));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
}
