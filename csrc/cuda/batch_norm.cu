#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_batch_norm.h"
#include "../integers.h"
#include "../tensors.h"
#include "batch_norm.cuh"
#include "launch.h"

namespace kfo::cuda {

namespace {

// A contiguous operand, which it keeps alive; absent if there is no tensor.
class Contiguous {
 public:
  explicit Contiguous(const std::optional<Tensor>& tensor) {
    if (tensor) tensor_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
  }

  template <typename T>
  const T* data() const {
    return tensor_ ? static_cast<const T*>(tensor_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> tensor_;
};

Tensor new_output(const Tensor& x, bool needed) {
  return kfo::new_output(x, needed, {x.size(0), x.size(1), x.size(2)});
}

Tensor new_gradient(const Tensor& x, const Tensor& parameter, bool needed) {
  return kfo::new_output(x, needed, {parameter.size(0), x.size(2)});
}

template <typename T>
BatchNormArguments<T> arguments(const Tensor& x, const Tensor& weight, const Tensor& bias, bool relu) {
  BatchNormArguments<T> args{};
  args.tasks = x.size(0), args.rows = x.size(1), args.channels = x.size(2);
  args.weight_stride = weight.size(0) == 1 ? 0 : args.channels;
  args.bias_stride = bias.size(0) == 1 ? 0 : args.channels;
  args.relu = relu;
  return args;
}

template <typename T>
bool fits_vectors(const BatchNormArguments<T>& args) {
  bool fits = args.channels % Vector<T>::kWidth == 0;
  const T* const shaped_like_x[] = {args.x, args.dy, args.ddx, args.y, args.dx, args.ddy};
  for (const T* data : shaped_like_x) fits = fits && reinterpret_cast<uintptr_t>(data) % sizeof(Vector<T>) == 0;
  return fits;
}

// The two launches of an order, S sums each, and the sum over tasks of the gradients of shared parameters.
template <auto kSums, auto kOrder, int S, typename T>
void run_batch_norm(const char* op, const Tensor& x, BatchNormArguments<T> args, const Tensor& dweight,
                    const Tensor& dbias) {
  const Launcher launcher(op, x.get_device_index());
  const int64_t blocks = cut_batch_norm(args), tiles = args.tasks * args.groups;
  args.vectors = fits_vectors(args);

  // Gradients of shared parameters are a row for each task first, behind the sums in the scratch memory.
  const int64_t sums = blocks * S * group_channels<T>(), row = args.tasks * args.channels;
  std::array<T**, 2> gradients{&args.dweight, &args.dbias};
  const std::array<const Tensor*, 2> outputs{&dweight, &dbias};
  TaskSumArguments<T> over_tasks{args.tasks, args.channels, {}, {}};
  int64_t size = sums;
  std::array<int64_t, 2> offsets{};
  for (int i = 0; i < 2; ++i)
    if (*gradients[i] && outputs[i]->size(0) != args.tasks) {
      over_tasks.to[i] = *gradients[i];
      offsets[i] = size;
      size += row;
    }
  // Freed on return but safe: torch's allocator reuses it on this stream only.
  const Tensor scratch = new_tensor(x, {size});
  args.partials = static_cast<T*>(scratch.mutable_data_ptr());
  for (int i = 0; i < 2; ++i)
    if (over_tasks.to[i]) over_tasks.from[i] = *gradients[i] = args.partials + offsets[i];

  const bool elementwise = args.y || args.dx || args.ddy;
  if (elementwise || args.dweight || args.dbias) {
    launcher.launch<kSums>(blocks, S * kBatchNormSharedBytes, args);
    if (!elementwise) args.launched = 1;
    launcher.launch<kOrder>(tiles * args.launched, S * kBatchNormSharedBytes, args);
  }
  if (over_tasks.to[0] || over_tasks.to[1])
    launcher.launch<batch_norm_task_sum_kernel<T>>(ceil_div<int64_t>(2 * args.channels, kThreads), 0, over_tasks);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_cuda(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                        double eps, bool relu) {
  check_batch_norm_relu(x, weight, bias, eps);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Contiguous in_x(x), in_weight(weight), in_bias(bias);
  const Tensor y = new_output(x, true);
  const Tensor mean = new_tensor(x, {x.size(0), x.size(2)});
  const Tensor rstd = new_tensor(x, {x.size(0), x.size(2)});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    BatchNormArguments<T> args = arguments<T>(x, weight, bias, relu);
    args.eps = static_cast<T>(eps);
    args.x = in_x.data<T>(), args.weight = in_weight.data<T>(), args.bias = in_bias.data<T>();
    args.new_mean = written<T>(mean), args.new_rstd = written<T>(rstd), args.y = written<T>(y);
    run_batch_norm<batch_norm_statistics_kernel<T>, batch_norm_forward_kernel<T>, 3>("batch_norm_relu", x, args, weight,
                                                                                     bias);
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward_cuda(const Tensor& x, const Tensor& weight,
                                                                 const Tensor& bias, const Tensor& mean,
                                                                 const Tensor& rstd, const Tensor& dy, bool relu,
                                                                 const std::vector<bool>& need) {
  check_batch_norm_relu_backward(x, weight, bias, mean, rstd, dy, need);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Contiguous in_x(x), in_weight(weight), in_bias(bias), in_mean(mean), in_rstd(rstd), in_dy(dy);
  const Tensor dx = new_output(x, need[0]);
  const Tensor dweight = new_gradient(x, weight, need[1]), dbias = new_gradient(x, bias, need[2]);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    BatchNormArguments<T> args = arguments<T>(x, weight, bias, relu);
    args.x = in_x.data<T>(), args.weight = in_weight.data<T>(), args.bias = in_bias.data<T>();
    args.mean = in_mean.data<T>(), args.rstd = in_rstd.data<T>(), args.dy = in_dy.data<T>();
    args.dx = written<T>(dx), args.dweight = written<T>(dweight), args.dbias = written<T>(dbias);
    run_batch_norm<batch_norm_backward_sums_kernel<T>, batch_norm_backward_kernel<T>, 2>("batch_norm_relu_backward", x,
                                                                                         args, dweight, dbias);
  });
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_double_backward_cuda(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& dy,
    const std::optional<Tensor>& ddx, const std::optional<Tensor>& ddweight, const std::optional<Tensor>& ddbias,
    bool relu, const std::vector<bool>& need) {
  check_batch_norm_relu_double_backward(x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, need);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Contiguous in_x(x), in_weight(weight), in_bias(bias), in_mean(mean), in_rstd(rstd), in_dy(dy);
  const Contiguous in_ddx(ddx), in_ddweight(ddweight), in_ddbias(ddbias);
  const Tensor dx = new_output(x, need[0]), dweight = new_gradient(x, weight, need[1]), ddy = new_output(x, need[2]);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    BatchNormArguments<T> args = arguments<T>(x, weight, bias, relu);
    args.x = in_x.data<T>(), args.weight = in_weight.data<T>(), args.bias = in_bias.data<T>();
    args.mean = in_mean.data<T>(), args.rstd = in_rstd.data<T>(), args.dy = in_dy.data<T>();
    args.ddx = in_ddx.data<T>(), args.ddweight = in_ddweight.data<T>(), args.ddbias = in_ddbias.data<T>();
    args.dx = written<T>(dx), args.dweight = written<T>(dweight), args.ddy = written<T>(ddy);
    run_batch_norm<batch_norm_double_backward_sums_kernel<T>, batch_norm_double_backward_kernel<T>, 5>(
        "batch_norm_relu_double_backward", x, args, dweight, bias);
  });
  return {dx, dweight, ddy};
}

}  // namespace kfo::cuda

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CUDA, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&kfo::cuda::batch_norm_relu_cuda));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&kfo::cuda::batch_norm_relu_backward_cuda));
  m.impl("batch_norm_relu_double_backward", TORCH_BOX(&kfo::cuda::batch_norm_relu_double_backward_cuda));
}
