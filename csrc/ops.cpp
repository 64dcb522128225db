// Binds the fused operators of the CrossDiT block.
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/gated_residual.h"
#include "cpu/layernorm_modulate.h"
#include "cpu/pieces.h"
#include "cpu/qk_norm_rope.h"

namespace {

using namespace k5::binding;

// A modulation in float32 with unit stride along the width: [B * clips, d] or [B, S, d].
Tensor modulation_rows(const Tensor& modulation) { return with_unit_stride(to_float(modulation)); }

// A dense tensor in a dtype that for_dtype takes: its own, or float32.
Tensor dense_float_or_bfloat16(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::BFloat16 ? contiguous(tensor) : dense_float(tensor);
}

// How the kernels walk `rows`, a result of modulation_rows that must outlive it.
k5::Modulation modulation_of(const Tensor& rows, int64_t clips) {
  const int64_t stride = rows.stride(0);
  if (rows.dim() == 3) return {data<float>(rows), stride, 0, rows.stride(1)};
  return {data<float>(rows), clips * stride, stride, 0};
}

// The pieces of a batch of sequences (cpu/pieces.h), those of the first clip of the first sample first.
struct Pieces {
  Pieces(int64_t batch, const std::vector<int64_t>& clip_starts) {
    const int64_t clips = clip_starts.size() - 1, tokens = clip_starts.back();
    for (int64_t sample = 0; sample < batch; sample++)
      for (int64_t clip = 0; clip < clips; clip++) {
        first_pieces.push_back(pieces.size());
        const int64_t end = clip_starts[clip + 1];
        for (int64_t token = clip_starts[clip]; token < end; token += k5::kPieceRows)
          pieces.push_back({sample * tokens + token,
                            sample * tokens + std::min(token + k5::kPieceRows, end),
                            {sample, clip, token}});
      }
    first_pieces.push_back(pieces.size());
  }
  int64_t count() const { return pieces.size(); }

  std::vector<k5::Piece> pieces;
  std::vector<int64_t> first_pieces;
};

// The gradient of a modulation of this shape, in float32: a kernel writes a row a token to it, or a row a piece to
// memory of its own, and `finish` adds those up.
class GradientOfModulation {
 public:
  GradientOfModulation(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape, const Pieces& pieces)
      : pieces_(pieces),
        per_token_(shape.size() == 3),
        width_(shape[shape.size() - 1]),
        result_(torch::stable::new_empty(like, shape, ScalarType::Float)),
        sums_(per_token_ ? 0 : pieces.count() * width_) {}

  k5::ModulationGradient rows() { return {per_token_ ? mutable_data<float>(result_) : sums_.data(), per_token_}; }

  Tensor finish() {
    if (per_token_) return result_;
    const k5::PieceSums op{sums_.data(), pieces_.first_pieces.data(), mutable_data<float>(result_), width_};
    const int64_t segments = pieces_.first_pieces.size() - 1;
    parallel_for(0, segments * k5::column_blocks(width_), 1,
                 [&](int64_t first, int64_t end) { K5_DISPATCH(add_pieces, op, first, end); });
    return result_;
  }

 private:
  const Pieces& pieces_;
  const bool per_token_;
  const int64_t width_;
  Tensor result_;
  const AlignedFloats sums_;
};

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
        static_cast<float>(eps),
        past_caches<T>(out, x.size(2), 2 * k5::kLanes)};
    parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)), [&](int64_t first, int64_t end) {
      K5_DISPATCH_AVX512(layernorm_modulate, op, first, end);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layernorm_modulate_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                               double eps, std::vector<int64_t> shift_shape,
                                                               std::vector<int64_t> clip_starts) {
  const int64_t width = x.size(2);
  const Tensor dense_grad = contiguous(grad), dense_x = contiguous(x), scale_rows = modulation_rows(scale);
  const Pieces pieces(x.size(0), clip_starts);
  GradientOfModulation grad_shift(x, shift_shape, pieces), grad_scale(x, scale.sizes(), pieces);
  Tensor grad_x = new_like(x);
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const k5::LayerNormModulateBackward<T> op{
        data<T>(dense_grad),
        data<T>(dense_x),
        modulation_of(scale_rows, clip_starts.size() - 1),
        mutable_data<T>(grad_x),
        grad_shift.rows(),
        grad_scale.rows(),
        {clip_starts.data(), x.size(1)},
        width,
        static_cast<float>(eps),
        past_caches<T>(grad_x, width, 2 * k5::kLanes)};
    parallel_for(0, pieces.count(), grain(k5::kPieceRows * width), [&](int64_t first, int64_t end) {
      K5_DISPATCH_AVX512(layernorm_modulate_backward, op, pieces.pieces.data(), first, end);
    });
  });
  return {grad_x, grad_shift.finish(), grad_scale.finish()};
}

Tensor gated_residual(const Tensor& x, const Tensor& y, const Tensor& gate, std::vector<int64_t> clip_starts) {
  const Tensor dense_x = contiguous(x), gate_rows = modulation_rows(gate);
  const Tensor dense_y = dense_float_or_bfloat16(y);
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
          x.size(2),
          past_caches<X>(out, x.size(2), 2 * k5::kLanes)};
      parallel_for(0, x.size(0) * x.size(1), grain(x.size(2)), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(gated_residual, op, first, end);
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> gated_residual_backward(const Tensor& grad, const Tensor& y, const Tensor& gate,
                                                   std::vector<int64_t> clip_starts) {
  const int64_t width = y.size(2);
  const Tensor dense_grad = contiguous(grad), dense_y = contiguous(y), gate_rows = modulation_rows(gate);
  const Pieces pieces(y.size(0), clip_starts);
  GradientOfModulation grad_gate(y, gate.sizes(), pieces);
  Tensor grad_y = new_like(y);
  for_dtype("grad", grad, [&](auto grad_element) {
    for_dtype("y", y, [&](auto y_element) {
      using X = decltype(grad_element);
      using Y = decltype(y_element);
      const k5::GatedResidualBackward<X, Y> op{
          data<X>(dense_grad),
          data<Y>(dense_y),
          modulation_of(gate_rows, clip_starts.size() - 1),
          mutable_data<Y>(grad_y),
          grad_gate.rows(),
          {clip_starts.data(), y.size(1)},
          width,
          past_caches<Y>(grad_y, width, 2 * k5::kLanes)};
      parallel_for(0, pieces.count(), grain(k5::kPieceRows * width), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(gated_residual_backward, op, pieces.pieces.data(), first, end);
      });
    });
  });
  return {grad_y, grad_gate.finish()};
}

// `tensor` [batch, sequence, heads, width] has unit stride along the width.
template <class T>
k5::Heads<T> heads_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Tensor norm_rope(const Tensor& x, const Tensor& weight, const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor strided = with_unit_stride(x);
  Tensor out = new_like(x);
  for_dtype("q and k", x, [&](auto element) {
    using T = decltype(element);
    const k5::NormRope<T> op{
        heads_of<T>(strided),
        data<float>(weight),
        data<float>(cos),
        data<float>(sin),
        mutable_data<T>(out),
        x.size(1),
        x.size(2),
        x.size(3),
        static_cast<float>(eps),
        past_caches<T>(out, x.size(3), 2 * k5::kLanes)};
    parallel_for(0, x.size(0) * x.size(1), grain(x.size(2) * x.size(3)), [&](int64_t first, int64_t end) {
      K5_DISPATCH_AVX512(norm_rope, op, first, end);
    });
  });
  return out;
}

// Gradients of x and of the weight.
std::tuple<Tensor, Tensor> norm_rope_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                              const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor strided_grad = with_unit_stride(grad), strided = with_unit_stride(x);
  const int64_t width = x.size(3), pieces = (x.size(0) * x.size(1) + k5::kPieceRows - 1) / k5::kPieceRows;
  const int64_t first_pieces[] = {0, pieces};
  const AlignedFloats sums(pieces * width);
  Tensor grad_x = new_like(x), grad_weight = new_like(weight);
  for_dtype("q and k", x, [&](auto element) {
    using T = decltype(element);
    const k5::NormRopeBackward<T> op{
        heads_of<T>(strided_grad),
        heads_of<T>(strided),
        data<float>(weight),
        data<float>(cos),
        data<float>(sin),
        mutable_data<T>(grad_x),
        sums.data(),
        x.size(0),
        x.size(1),
        x.size(2),
        width,
        static_cast<float>(eps),
        past_caches<T>(grad_x, width, 2 * k5::kLanes)};
    parallel_for(0, pieces, grain(k5::kPieceRows * x.size(2) * width), [&](int64_t first, int64_t end) {
      K5_DISPATCH_AVX512(norm_rope_backward, op, first, end);
    });
  });
  const k5::PieceSums op{sums.data(), first_pieces, mutable_data<float>(grad_weight), width};
  K5_DISPATCH(add_pieces, op, 0, k5::column_blocks(width));
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& q_weight,
                                        const Tensor& k_weight, const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor dense_cos = dense_float(cos), dense_sin = dense_float(sin);
  return {norm_rope(q, dense_float(q_weight), dense_cos, dense_sin, eps),
          norm_rope(k, dense_float(k_weight), dense_cos, dense_sin, eps)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& grad_q, const Tensor& grad_k,
                                                                 const Tensor& q, const Tensor& k,
                                                                 const Tensor& q_weight, const Tensor& k_weight,
                                                                 const Tensor& cos, const Tensor& sin, double eps) {
  const Tensor dense_cos = dense_float(cos), dense_sin = dense_float(sin);
  const auto [grad_of_q, grad_q_weight] =
      norm_rope_backward(grad_q, q, dense_float(q_weight), dense_cos, dense_sin, eps);
  const auto [grad_of_k, grad_k_weight] =
      norm_rope_backward(grad_k, k, dense_float(k_weight), dense_cos, dense_sin, eps);
  return {grad_of_q, grad_of_k, grad_q_weight, grad_k_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("gated_residual", TORCH_BOX(&gated_residual));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("layernorm_modulate", TORCH_BOX(&layernorm_modulate));
  m.impl("layernorm_modulate_backward", TORCH_BOX(&layernorm_modulate_backward));
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward));
}
