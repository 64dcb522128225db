// Binds GroupNorm and SiLU, what stands before every convolution of the VAE.
#include <cmath>
#include <tuple>
#include <vector>

#include "binding.h"
#include "cpu/groupnorm_silu_apply.h"
#include "cpu/groupnorm_silu_backward.h"
#include "cpu/groupnorm_statistics.h"
#include "cpu/pieces.h"

namespace {

using namespace k5::binding;
using torch::headeronly::MemoryFormat;

// Chunks of channels-last that a thread takes at a time.
constexpr int64_t kPartChunks = 8;

// The format of the result, by the rule in k5kernels/ops/groupnorm_statistics.py.
MemoryFormat groupnorm_format(const Tensor& x) {
  const bool channels_innermost = !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1;
  if (channels_innermost && x.dim() == 4) return MemoryFormat::ChannelsLast;
  if (channels_innermost && x.dim() == 5) return MemoryFormat::ChannelsLast3d;
  return MemoryFormat::Contiguous;
}

// Values of a row of a dense tensor: channels where they are last, else positions.
int64_t innermost(const Tensor& x) { return x.is_contiguous() ? x.numel() / (x.size(0) * x.size(1)) : x.size(1); }

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
          static_cast<float>(eps),
          past_caches<T>(out, innermost(x), 2 * k5::kLanes)};
}

template <class T>
void statistics_channels_last(const k5::GroupNormStatistics<T>& op, int64_t batch) {
  const int64_t chunks = batch * k5::chunks_of(op.positions);
  std::vector<float> partial(2 * chunks * op.channels);
  for_parts(chunks, kPartChunks, [&](int64_t first, int64_t end) {
    K5_DISPATCH_AVX512(groupnorm_statistics_of_chunks, op, partial.data(), first, end);
  });
  parallel_for(0, batch, 1, [&](int64_t first, int64_t end) {
    K5_DISPATCH_AVX512(groupnorm_statistics_merge, op, partial.data(), first, end);
  });
}

// Of the channels of all samples, for the second step of channels-last.
template <class T>
std::vector<float> channels_of(const k5::GroupNormSiLU<T>& op, int64_t batch) {
  std::vector<float> channels(batch * k5::kChannelRows * k5::whole_sixteens(op.channels));
  K5_DISPATCH_AVX512(groupnorm_silu_channels, op, channels.data(), 0, batch);
  return channels;
}

template <class T>
void silu_channels_last(const k5::GroupNormSiLU<T>& op, int64_t batch) {
  const std::vector<float> of_channels = channels_of(op, batch);
  for_parts(batch * op.positions, 8 * grain(op.channels), [&](int64_t first, int64_t end) {
    K5_DISPATCH_AVX512(groupnorm_silu_channels_last, op, of_channels.data(), first, end);
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
        K5_DISPATCH_AVX512(groupnorm_statistics_contiguous, op, first, end);
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
        K5_DISPATCH_AVX512(groupnorm_silu_contiguous, op, first, end);
      });
    } else {
      silu_channels_last(op, batch);
    }
  });
  return out;
}

// groupnorm_silu_apply with a border of copies: pad is the frames before the first, then the rows and the columns on
// both sides.
Tensor groupnorm_silu_padded(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                             const Tensor& bias, std::vector<int64_t> pad, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  const Tensor dense_mean = contiguous(mean), dense_variance = contiguous(variance);
  const k5::Border border{x.size(2), x.size(3), x.size(4), pad[0], pad[1], pad[2]};
  const int64_t batch = x.size(0), channels = x.size(1), groups = mean.size(1);
  const int64_t sizes[] = {batch, channels, border.padded_frames(), border.padded_height(), border.padded_width()};
  Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
  if (out.numel() == 0) return out;
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    auto op = silu_of<T>(dense, data<double>(dense_mean), data<double>(dense_variance), dense_weight, dense_bias, out,
                         groups, eps);
    if (format == MemoryFormat::Contiguous) {
      op.past_caches = larger_than_caches<T>(out);  // whatever the width of a row
      const int64_t rows = batch * channels * border.padded_frames() * border.padded_height();
      for_parts(rows, 8 * grain(border.width), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(groupnorm_silu_padded_contiguous, op, border, first, end);
      });
    } else {
      const std::vector<float> of_channels = channels_of(op, batch);
      const int64_t rows = batch * border.frames * border.height;
      for_parts(rows, 8 * grain(border.width * channels), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(groupnorm_silu_padded_channels_last, op, border, of_channels.data(), first, end);
      });
    }
  });
  return out;
}

// groupnorm_statistics and groupnorm_silu_apply in one call; where x is contiguous, each group is normalized while its
// values are still in the cache.
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
          K5_DISPATCH_AVX512(groupnorm_statistics_contiguous, statistics, group, group + 1);
          K5_DISPATCH_AVX512(groupnorm_silu_contiguous, silu, group, group + 1);
        }
      });
    } else {
      statistics_channels_last(statistics, batch);
      silu_channels_last(silu, batch);
    }
  });
  return out;
}

// What the kernels of the backward know of every channel, and what the forward's parameters get from their sums.
class ChannelTerms {
 public:
  // scale_of_gradient: of the kernels' sums, as of T.
  ChannelTerms(const double* mean, const double* variance, const float* weight, const float* bias, int64_t batch,
               int64_t channels, int64_t groups, double eps, double scale_of_gradient)
      : mean_(mean),
        variance_(variance),
        weight_(weight),
        bias_(bias),
        batch_(batch),
        channels_(channels),
        in_group_(channels / groups),
        groups_(groups),
        eps_(eps),
        scale_of_gradient_(scale_of_gradient),
        terms_(batch * k5::kTerms * channels),
        sums_(batch * 2 * channels) {}

  const float* terms() const { return terms_.data(); }
  float* sums() const { return sums_.data(); }  // [batch, 2, channels]
  double inverse_deviation(int64_t group) const { return 1 / std::sqrt(variance_[group] + eps_); }

  // Of a group of a sample, numbered sample * groups + group: the terms where the statistics are constants.
  void set(int64_t group) const {
    for_channels(group, [&](int64_t channel, float* terms, const float*) {
      set_term(terms, k5::kCentre, mean_[group]);
      set_term(terms, k5::kSlope, inverse_deviation(group) * weight_[channel]);
      set_term(terms, k5::kBias, bias_[channel]);
      set_term(terms, k5::kWeight, weight_[channel]);
      set_term(terms, k5::kLinear, 0);
      set_term(terms, k5::kConstant, 0);
      set_term(terms, k5::kInverse, inverse_deviation(group) / scale_of_gradient_);
    });
  }

  // Sums over a group's channels and positions: of the gradient of the normalized x, and of its product with that.
  std::tuple<double, double> group_sums(int64_t group) const {
    const auto [gradients, products] = scaled_group_sums(group);
    return {gradients / scale_of_gradient_, products / scale_of_gradient_};
  }

  // Adds what flows through the statistics of the group, which has `size` values.
  void add_statistics(int64_t group, int64_t size) const {
    const auto [gradients, products] = scaled_group_sums(group);
    const double inverse = inverse_deviation(group);
    for_channels(group, [&, gradients = gradients, products = products](int64_t, float* terms, const float*) {
      set_term(terms, k5::kLinear, inverse * products / size);
      set_term(terms, k5::kConstant, gradients / size);
    });
  }

  // Gradients of weight and bias.
  std::tuple<Tensor, Tensor> affine_gradients(const Tensor& like) const {
    Tensor grad_weight = torch::stable::new_empty(like, {channels_}, ScalarType::Float);
    Tensor grad_bias = new_like(grad_weight);
    for (int64_t channel = 0; channel < channels_; channel++) {
      double of_weight = 0, of_bias = 0;
      for (int64_t sample = 0; sample < batch_; sample++) {
        const float* sums = sums_.data() + sample * 2 * channels_ + channel;
        of_weight += sums[channels_] * inverse_deviation(sample * groups_ + channel / in_group_);
        of_bias += sums[0];
      }
      mutable_data<float>(grad_weight)[channel] = static_cast<float>(of_weight / scale_of_gradient_);
      mutable_data<float>(grad_bias)[channel] = static_cast<float>(of_bias / scale_of_gradient_);
    }
    return {grad_weight, grad_bias};
  }

 private:
  // As the kernels sum up: a group of one value then has a constant that is its gradient to the last bit.
  std::tuple<double, double> scaled_group_sums(int64_t group) const {
    double gradients = 0, products = 0;
    for_channels(group, [&](int64_t channel, float*, const float* sums) {
      gradients += static_cast<double>(weight_[channel]) * sums[0];
      products += static_cast<double>(weight_[channel]) * sums[channels_] * inverse_deviation(group);
    });
    return {gradients, products};
  }

  // NaNs are plain for the sake of Ties::away.
  void set_term(float* terms, k5::Term term, double value) const {
    terms[term * channels_] = k5::with_plain_nan(static_cast<float>(value));
  }

  // Calls visit(channel, terms, sums) with the channel's place in the first row of each.
  template <class Visit>
  void for_channels(int64_t group, const Visit& visit) const {
    const int64_t sample = group / groups_, begin = group % groups_ * in_group_;
    for (int64_t channel = begin; channel < begin + in_group_; channel++)
      visit(channel, terms_.data() + sample * k5::kTerms * channels_ + channel,
            sums_.data() + sample * 2 * channels_ + channel);
  }

  const double *mean_, *variance_;
  const float *weight_, *bias_;
  const int64_t batch_, channels_, in_group_, groups_;
  const double eps_, scale_of_gradient_;
  const AlignedFloats terms_, sums_;
};

double scale_of_gradient(const Tensor& x) {
  double scale = 1;
  for_dtype("x", x, [&](auto element) { scale = k5::kScaleOfGradient<decltype(element)>; });
  return scale;
}

// Channels-last: the gradient where grad_x is not null, the sums where sums is not null.
template <class T>
void backward_channels_last(k5::GroupNormSiLUBackward<T> op, int64_t batch) {
  const int64_t chunks = k5::chunks_of(op.positions), width = 2 * op.channels;
  float* const sums = op.sums;
  const AlignedFloats partial(sums ? batch * chunks * width : 0);
  if (sums) op.sums = partial.data();
  for_parts(batch * chunks, kPartChunks, [&](int64_t first, int64_t end) {
    K5_DISPATCH_AVX512(groupnorm_silu_backward_channels_last, op, first, end);
  });
  if (!sums) return;
  std::vector<int64_t> first_chunks(batch + 1);
  for (int64_t sample = 0; sample <= batch; sample++) first_chunks[sample] = sample * chunks;
  const k5::PieceSums merge{partial.data(), first_chunks.data(), sums, width};
  parallel_for(0, batch * k5::column_blocks(width), 1,
               [&](int64_t first, int64_t end) { K5_DISPATCH(add_pieces, merge, first, end); });
}

// The kernel's arguments for dense tensors of one format, without grad_x and sums.
template <class T>
k5::GroupNormSiLUBackward<T> backward_of(const Tensor& grad, const Tensor& x, const ChannelTerms& terms,
                                         const Tensor& grad_x) {
  return {data<T>(grad),
          data<T>(x),
          terms.terms(),
          nullptr,
          nullptr,
          x.size(1),
          x.numel() / (x.size(0) * x.size(1)),
          past_caches<T>(grad_x, innermost(grad_x), 2 * k5::kLanes)};
}

// Gradients of x, mean, variance, weight and bias.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> groupnorm_silu_apply_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
    const Tensor& bias, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_grad = contiguous(grad, format);
  const Tensor dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  const Tensor dense_mean = contiguous(mean), dense_variance = contiguous(variance);
  const int64_t batch = x.size(0), channels = x.size(1), groups = mean.size(1);
  Tensor grad_x = torch::stable::empty_like(dense), grad_mean = new_like(mean), grad_variance = new_like(mean);
  const ChannelTerms terms(data<double>(dense_mean), data<double>(dense_variance), data<float>(dense_weight),
                           data<float>(dense_bias), batch, channels, groups, eps, scale_of_gradient(x));
  for (int64_t group = 0; group < batch * groups; group++) terms.set(group);
  if (x.numel() == 0) {
    std::fill_n(terms.sums(), batch * 2 * channels, 0.0f);
  } else {
    for_dtype("x", x, [&](auto element) {
      using T = decltype(element);
      auto op = backward_of<T>(dense_grad, dense, terms, grad_x);
      op.grad_x = mutable_data<T>(grad_x);
      op.sums = terms.sums();
      if (format == MemoryFormat::Contiguous) {
        parallel_for(0, batch * channels, grain(op.positions), [&](int64_t first, int64_t end) {
          K5_DISPATCH_AVX512(groupnorm_silu_backward_contiguous, op, first, end);
        });
      } else {
        backward_channels_last(op, batch);
      }
    });
  }
  for (int64_t group = 0; group < batch * groups; group++) {
    const auto [gradients, products] = terms.group_sums(group);
    const double inverse = terms.inverse_deviation(group);
    mutable_data<double>(grad_mean)[group] = -inverse * gradients;
    mutable_data<double>(grad_variance)[group] = -0.5 * inverse * inverse * products;
  }
  const auto [grad_weight, grad_bias] = terms.affine_gradients(x);
  return {grad_x, grad_mean, grad_variance, grad_weight, grad_bias};
}

// Gradients of x, weight and bias. Where x is contiguous, a group's values are still in the cache when they are needed
// again.
std::tuple<Tensor, Tensor, Tensor> groupnorm_silu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const Tensor& bias, int64_t groups, double eps) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_grad = contiguous(grad, format);
  const Tensor dense_weight = dense_float(weight), dense_bias = dense_float(bias);
  const int64_t batch = x.size(0), channels = x.size(1), in_group = channels / groups;
  Tensor grad_x = torch::stable::empty_like(dense);
  std::vector<double> mean(batch * groups), variance(batch * groups);
  const ChannelTerms terms(mean.data(), variance.data(), data<float>(dense_weight), data<float>(dense_bias), batch,
                           channels, groups, eps, scale_of_gradient(x));
  if (x.numel() == 0) {
    std::fill_n(terms.sums(), batch * 2 * channels, 0.0f);
    const auto [grad_weight, grad_bias] = terms.affine_gradients(x);
    return {grad_x, grad_weight, grad_bias};
  }
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const auto statistics = statistics_of<T>(dense, mean.data(), variance.data(), groups);
    auto sums = backward_of<T>(dense_grad, dense, terms, grad_x), gradient = sums;
    sums.sums = terms.sums();
    gradient.grad_x = mutable_data<T>(grad_x);
    const int64_t size = in_group * gradient.positions;
    if (format == MemoryFormat::Contiguous) {
      parallel_for(0, batch * groups, grain(size), [&](int64_t first, int64_t end) {
        for (int64_t group = first; group < end; group++) {
          const int64_t first_channel = group * in_group, end_channel = first_channel + in_group;
          K5_DISPATCH_AVX512(groupnorm_statistics_contiguous, statistics, group, group + 1);
          terms.set(group);
          K5_DISPATCH_AVX512(groupnorm_silu_backward_contiguous, sums, first_channel, end_channel);
          terms.add_statistics(group, size);
          K5_DISPATCH_AVX512(groupnorm_silu_backward_contiguous, gradient, first_channel, end_channel);
        }
      });
    } else {
      statistics_channels_last(statistics, batch);
      for (int64_t group = 0; group < batch * groups; group++) terms.set(group);
      backward_channels_last(sums, batch);
      for (int64_t group = 0; group < batch * groups; group++) terms.add_statistics(group, size);
      backward_channels_last(gradient, batch);
    }
  });
  const auto [grad_weight, grad_bias] = terms.affine_gradients(x);
  return {grad_x, grad_weight, grad_bias};
}

Tensor groupnorm_statistics_backward(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,
                                     const Tensor& mean) {
  const MemoryFormat format = groupnorm_format(x);
  const Tensor dense = contiguous(x, format), dense_mean = contiguous(mean);
  const Tensor of_mean = contiguous(grad_mean), of_variance = contiguous(grad_variance);
  Tensor grad_x = torch::stable::empty_like(dense);
  if (x.numel() == 0) return grad_x;
  const int64_t batch = x.size(0), channels = x.size(1), groups = mean.size(1), in_group = channels / groups;
  const int64_t positions = x.numel() / (batch * channels);
  const double size = static_cast<double>(in_group * positions);
  const AlignedFloats terms(batch * 3 * channels);
  for (int64_t sample = 0; sample < batch; sample++)
    for (int64_t channel = 0; channel < channels; channel++) {
      const int64_t group = sample * groups + channel / in_group;
      float* of_channel = terms.data() + sample * 3 * channels + channel;
      of_channel[0] = static_cast<float>(data<double>(dense_mean)[group]);
      of_channel[channels] = static_cast<float>(2 * data<double>(of_variance)[group] / size);
      of_channel[2 * channels] = static_cast<float>(data<double>(of_mean)[group] / size);
    }
  for_dtype("x", x, [&](auto element) {
    using T = decltype(element);
    const k5::GroupNormStatisticsBackward<T> op{
        data<T>(dense),     terms.data(), mutable_data<T>(grad_x), channels, positions,
        past_caches<T>(grad_x, innermost(grad_x))};
    if (format == MemoryFormat::Contiguous) {
      parallel_for(0, batch * channels, grain(positions), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(groupnorm_statistics_backward_contiguous, op, first, end);
      });
    } else {
      parallel_for(0, batch * positions, grain(channels), [&](int64_t first, int64_t end) {
        K5_DISPATCH_AVX512(groupnorm_statistics_backward_channels_last, op, first, end);
      });
    }
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(k5_cpu, CPU, m) {
  m.impl("groupnorm_silu", TORCH_BOX(&groupnorm_silu));
  m.impl("groupnorm_silu_backward", TORCH_BOX(&groupnorm_silu_backward));
  m.impl("groupnorm_silu_apply", TORCH_BOX(&groupnorm_silu_apply));
  m.impl("groupnorm_silu_apply_backward", TORCH_BOX(&groupnorm_silu_apply_backward));
  m.impl("groupnorm_silu_padded", TORCH_BOX(&groupnorm_silu_padded));
  m.impl("groupnorm_statistics", TORCH_BOX(&groupnorm_statistics));
  m.impl("groupnorm_statistics_backward", TORCH_BOX(&groupnorm_statistics_backward));
}
