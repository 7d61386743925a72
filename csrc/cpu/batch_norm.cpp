// The three batch norm ops on the CPU: checks, outputs, channels over threads, and their registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_batch_norm.h"
#include "../integers.h"
#include "../tensors.h"
#include "batch_norm_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace kfo::cpu {

namespace {

constexpr int64_t kParallelElements = 1 << 14;  // below, starting the threads costs more than they save
constexpr int64_t kUnitBytes = 128;             // of a row: two cache lines, which the hardware fetches together

// Channels of a job. Each channel's results are the same bits whatever jobs it shares; more jobs for few tasks.
int64_t unit_channels(int64_t tasks, int64_t channels, int64_t element_size) {
  const int64_t line = kUnitBytes / 2 / element_size;
  const int64_t wide = std::min(kBatchNormChannels, 2 * line);
  return tasks * ceil_div(channels, wide) < 8 ? line : wide;
}

struct Sizes {
  explicit Sizes(const Tensor& x) : tasks(x.size(0)), rows(x.size(1)), channels(x.size(2)) {}
  int64_t tasks, rows, channels;
};

// What both derivatives read.
struct Saved {
  template <class T>
  void fill(BatchNormJob<T>& job, int64_t t, int64_t c) const {
    job.relu = relu;
    job.x = x.at<T>(t, c), job.weight = weight.at<T>(t, c), job.bias = bias.at<T>(t, c);
    job.mean = mean.at<T>(t, c), job.rstd = rstd.at<T>(t, c), job.dy = dy.at<T>(t, c);
  }

  Input x, weight, bias, mean, rstd, dy;
  bool relu;
};

// A new tensor of x's shape, or of shape (0,) if it is not needed.
struct Output {
  Output(const Tensor& x, bool needed) : tensor(new_output(x, needed, {x.size(0), x.size(1), x.size(2)})) {}

  template <class T>
  T* at(int64_t task, int64_t channel) const {
    T* const data = written<T>(tensor);
    return data ? data + task * tensor.stride(0) + channel : nullptr;
  }

  Tensor tensor;
};

// The gradient of a parameter: a row for each task; `sum` adds them up where the parameter has one row for all.
class Gradient {
 public:
  Gradient(const Tensor& x, const Tensor& parameter, bool needed)
      : needed_(needed), shared_(parameter.size(0) != x.size(0)), tasks_(x.size(0)), channels_(x.size(2)) {
    tensor = new_output(x, needed, {parameter.size(0), channels_});
    if (needed && shared_) rows_.resize(static_cast<size_t>(tasks_ * channels_ * x.element_size()));
  }

  template <class T>
  T* at(int64_t task, int64_t channel) {
    if (!needed_) return nullptr;
    return rows<T>() + task * channels_ + channel;
  }

  // In the order of the tasks.
  template <class T>
  void sum() {
    if (!needed_ || !shared_) return;
    T* out = static_cast<T*>(tensor.mutable_data_ptr());
    for (int64_t c = 0; c < channels_; ++c) {
      double total = 0;
      for (int64_t t = 0; t < tasks_; ++t) total += rows<T>()[t * channels_ + c];
      out[c] = static_cast<T>(total);
    }
  }

  Tensor tensor;

 private:
  template <class T>
  T* rows() {
    return shared_ ? reinterpret_cast<T*>(rows_.data()) : static_cast<T*>(tensor.mutable_data_ptr());
  }

  bool needed_, shared_;
  int64_t tasks_, channels_;
  std::vector<unsigned char> rows_;
};

const BatchNormKernels& chosen_kernels() {
  return chosen(avx512::batch_norm_kernels, avx2::batch_norm_kernels, baseline::batch_norm_kernels);
}

// kernel(fill(job, task, channel)) for every task and every few channels.
template <class T, class Fill>
void for_jobs(const Sizes& sizes, void (*kernel)(const BatchNormJob<T>&), Fill fill) {
  const int64_t width = unit_channels(sizes.tasks, sizes.channels, sizeof(T));
  const int64_t groups = ceil_div(sizes.channels, width), jobs = sizes.tasks * groups;
  const bool worth_threads = sizes.tasks * sizes.rows * sizes.channels >= kParallelElements;
  run_in_parallel(jobs, worth_threads, [&](int64_t i, int64_t) {
    const int64_t task = i / groups, channel = i % groups * width;
    BatchNormJob<T> job;
    job.rows = sizes.rows, job.stride = sizes.channels;
    job.channels = std::min(width, sizes.channels - channel);
    fill(job, task, channel);
    kernel(job);
  });
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   double eps, bool relu) {
  const BatchNormKernels& kernels = chosen_kernels();
  check_batch_norm_relu(x, weight, bias, eps);
  const Sizes sizes(x);
  const Input in_x(x), in_weight(weight), in_bias(bias);
  const Output y(x, true);
  const Tensor mean = new_tensor(x, {sizes.tasks, sizes.channels});
  const Tensor rstd = new_tensor(x, {sizes.tasks, sizes.channels});
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    T *means = written<T>(mean), *rstds = written<T>(rstd);
    for_jobs<T>(sizes, kernels.of<T>().forward, [&](BatchNormJob<T>& job, int64_t t, int64_t c) {
      job.eps = eps, job.relu = relu;
      job.x = in_x.at<T>(t, c), job.weight = in_weight.at<T>(t, c), job.bias = in_bias.at<T>(t, c);
      job.new_mean = means + t * sizes.channels + c, job.new_rstd = rstds + t * sizes.channels + c;
      job.y = y.at<T>(t, c);
    });
  });
  return {y.tensor, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_backward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                            const Tensor& mean, const Tensor& rstd, const Tensor& dy,
                                                            bool relu, const std::vector<bool>& need) {
  const BatchNormKernels& kernels = chosen_kernels();
  check_batch_norm_relu_backward(x, weight, bias, mean, rstd, dy, need);
  const Saved saved{Input(x), Input(weight), Input(bias), Input(mean), Input(rstd), Input(dy), relu};
  const Output dx(x, need[0]);
  Gradient dweight(x, weight, need[1]), dbias(x, bias, need[2]);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    for_jobs<T>(Sizes(x), kernels.of<T>().backward, [&](BatchNormJob<T>& job, int64_t t, int64_t c) {
      saved.fill(job, t, c);
      job.dx = dx.at<T>(t, c), job.dweight = dweight.at<T>(t, c), job.dbias = dbias.at<T>(t, c);
    });
    dweight.sum<T>(), dbias.sum<T>();
  });
  return {dx.tensor, dweight.tensor, dbias.tensor};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_double_backward(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& dy,
    const std::optional<Tensor>& ddx, const std::optional<Tensor>& ddweight, const std::optional<Tensor>& ddbias,
    bool relu, const std::vector<bool>& need) {
  const BatchNormKernels& kernels = chosen_kernels();
  check_batch_norm_relu_double_backward(x, weight, bias, mean, rstd, dy, ddx, ddweight, ddbias, need);
  const Saved saved{Input(x), Input(weight), Input(bias), Input(mean), Input(rstd), Input(dy), relu};
  const Input in_ddx(ddx), in_ddweight(ddweight), in_ddbias(ddbias);
  const Output dx(x, need[0]), ddy(x, need[2]);
  Gradient dweight(x, weight, need[1]);
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    for_jobs<T>(Sizes(x), kernels.of<T>().double_backward, [&](BatchNormJob<T>& job, int64_t t, int64_t c) {
      saved.fill(job, t, c);
      job.ddx = in_ddx.at<T>(t, c), job.ddweight = in_ddweight.at<T>(t, c), job.ddbias = in_ddbias.at<T>(t, c);
      job.dx = dx.at<T>(t, c), job.dweight = dweight.at<T>(t, c), job.ddy = ddy.at<T>(t, c);
    });
    dweight.sum<T>();
  });
  return {dx.tensor, dweight.tensor, ddy.tensor};
}

}  // namespace

}  // namespace kfo::cpu

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CPU, m) {
  m.impl("batch_norm_relu", TORCH_BOX(&kfo::cpu::batch_norm_relu));
  m.impl("batch_norm_relu_backward", TORCH_BOX(&kfo::cpu::batch_norm_relu_backward));
  m.impl("batch_norm_relu_double_backward", TORCH_BOX(&kfo::cpu::batch_norm_relu_double_backward));
}
