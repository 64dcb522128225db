// Binds the elementwise and normalization kernels of csrc/cpu, and the choice of instruction set.
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/gated_residual.h"
#include "cpu/groupnorm_silu.h"
#include "cpu/layernorm_modulate.h"
#include "cpu/qk_norm_rope.h"

namespace {

using namespace k5::binding;
using torch::headeronly::MemoryFormat;

// A per-sample [B, d] or per-token [B, S, d] modulation in float32, seen as [B, S, d].
struct Modulation {
  explicit Modulation(const Tensor& modulation)
      : tensor(with_unit_stride(to_float(modulation))),
        batch_stride(tensor.stride(0)),
        sequence_stride(tensor.dim() == 3 ? tensor.stride(1) : 0) {}
  const float* data() const { return k5::binding::data<float>(tensor); }
  Tensor tensor;
  int64_t batch_stride, sequence_stride;
};

Tensor layernorm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale, double eps) {
  const Tensor dense = contiguous(x);
  const Modulation shifts(shift), scales(scale);
  Tensor out = new_like(x);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const k5::LayerNormModulate<T> op{
        data<T>(dense),
        shifts.data(),
        scales.data(),
        mutable_data<T>(out),
        x.size(1),
        x.size(2),
        shifts.batch_stride,
        shifts.sequence_stride,
        scales.batch_stride,
        scales.sequence_stride,
        static_cast<float>(eps)};
    parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)), [&](int64_t first, int64_t end) {
      K5_DISPATCH(layernorm_modulate, op, first, end);
    });
  });
  return out;
}

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate) {
  const Tensor dense_x = contiguous(x);
  const Tensor dense_y = y.scalar_type() == ScalarType::BFloat16 ? contiguous(y) : dense_float(y);
  const Modulation gates(gate);
  Tensor out = new_like(x);
  for_dtype("x", x, [&](auto x_element) {
    for_dtype("y", dense_y, [&](auto y_element) {
      using X = decltype(x_element);
      using Y = decltype(y_element);
      const k5::GatedResidual<X, Y> op{
          data<X>(dense_x), data<Y>(dense_y),   gates.data(),         mutable_data<X>(out), x.size(1),
          x.size(2),        gates.batch_stride, gates.sequence_stride};
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

// The format of the result, by the rule in k5kernels/ops/groupnorm_silu.py.
MemoryFormat groupnorm_format(const Tensor& x) {
  const bool channels_innermost = !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1;
  if (channels_innermost && x.dim() == 4) return MemoryFormat::ChannelsLast;
  if (channels_innermost && x.dim() == 5) return MemoryFormat::ChannelsLast3d;
  return MemoryFormat::Contiguous;
}

template <class T>
void run_groupnorm_silu_channels_last(const k5::GroupNormSiLU<T>& op, int64_t batch) {
  const int64_t chunks = batch * k5::chunks_of(op.positions);
  std::vector<float> partial(2 * chunks * op.channels), moments(2 * batch * op.channels);
  const int64_t chunk_grain = grain(k5::kChunkPositions * op.channels);
  parallel_for(0, chunks, chunk_grain, [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_silu_partial, op, partial.data(), first, end);
  });
  parallel_for(0, batch, 1, [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_silu_moments, op, partial.data(), moments.data(), first, end);
  });
  parallel_for(0, chunks, chunk_grain, [&](int64_t first, int64_t end) {
    K5_DISPATCH(groupnorm_silu_apply, op, moments.data(), first, end);
  });
}

Tensor groupnorm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  Tensor out = torch::stable::empty_like(dense);
  if (x.numel() == 0) return out;
  const int64_t batch = x.size(0), channels = x.size(1);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const k5::GroupNormSiLU<T> op{
        data<T>(dense),
        data<float>(dense_weight),
        data<float>(dense_bias),
        mutable_data<T>(out),
        channels,
        x.numel() / (batch * channels),
        groups,
        static_cast<float>(eps)};
    if (format == MemoryFormat::Contiguous) {
      const int64_t group_size = x.numel() / (batch * groups);
      parallel_for(0, batch * groups, grain(group_size), [&](int64_t first, int64_t end) {
        K5_DISPATCH(groupnorm_silu_contiguous, op, first, end);
      });
    } else {
      run_groupnorm_silu_channels_last(op, batch);
    }
  });
  return out;
}

int64_t isa() { return static_cast<int64_t>(k5::current_isa()); }

bool force_isa(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= 2, "isa: expected 0 (portable), 1 (avx2) or 2 (avx512_bf16), got ", isa);
  return k5::force_isa(static_cast<k5::Isa>(isa));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(k5_cpu, m) {
  m.def("isa() -> int");
  m.def("force_isa(int isa) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("force_isa", TORCH_BOX(&force_isa));
}

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("groupnorm_silu", TORCH_BOX(&groupnorm_silu));
  m.impl("layernorm_modulate", TORCH_BOX(&layernorm_modulate));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
}
