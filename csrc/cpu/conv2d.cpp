// The convolution of each task's images with its own weights and its two gradients on the CPU: checks, outputs, threads
// and registration. The three are each other's derivatives.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "../check.h"
#include "../integers.h"
#include "../tensors.h"
#include "conv2d_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace kfo::cpu {

namespace {

constexpr int64_t kMostPadding = int64_t{1} << 60;  // twice that, and a size beside it, can be added
constexpr const char* kImages = "(tasks, images, height, width, channels)";
constexpr const char* kResults = "(tasks, images, height, width, out channels)";
constexpr const char* kWeights = "(tasks, out channels, in channels, height, width)";

// Checks the two operands of one op.
class Conv2dOperands : public OpChecks {
 public:
  Conv2dOperands(const char* op, const char* like_name, const Tensor& like, const char* layout, int64_t stride,
                 int64_t padding)
      : OpChecks(op, like_name, like) {
    if (stride < 1) fail("stride: expected at least 1, got " + std::to_string(stride));
    if (padding < 0 || padding > kMostPadding)
      fail("padding: expected from 0 to " + std::to_string(kMostPadding) + ", got " + std::to_string(padding));
    shape_.stride = stride, shape_.padding = padding;
    dimensions(like_name, like, 5, layout);
  }

  void other(const char* name, const Tensor& tensor, const char* layout) const {
    dimensions(name, tensor, 5, layout);
    alike(name, tensor);
    same(name, "tasks", tensor.size(0), like_.size(0));
  }

  // The whole shape: that there is something to compute with, and that it can be addressed.
  void shape() {
    Conv2dShape& s = shape_;
    for (const auto& [what, size] :
         {std::pair{"height", s.H}, {"width", s.W}, {"in channels", s.C}, {"out channels", s.O}})
      if (size < 1) fail(std::string(what) + ": expected at least 1, got " + std::to_string(size));
    if (std::max(s.H, s.W) > kMostPadding)
      fail("images of " + size_text(s.H, s.W) + " are too large to address with 64 bits");
    if (s.KH < 1 || s.KW < 1 || s.H + 2 * s.padding < s.KH || s.W + 2 * s.padding < s.KW)
      fail("a kernel of " + size_text(s.KH, s.KW) + " does not fit images of " + size_text(s.H, s.W) +
           " with padding " + std::to_string(s.padding));
    // A stride beyond the padded image leaves one result, as that of its size does.
    s.stride = std::min(s.stride, std::max(s.H, s.W) + 2 * s.padding);
    const double results = static_cast<double>(s.Ho()) * static_cast<double>(s.Wo());
    const double taps = static_cast<double>(s.KH) * static_cast<double>(s.KW);
    if (results * taps * static_cast<double>(s.C) * sizeof(double) > 0x1p62)
      fail("padding: " + std::to_string(s.padding) + " makes results of " + size_text(s.Ho(), s.Wo()) +
           ", too large to address with 64 bits");
  }

  void same(const char* name, const char* what, int64_t got, int64_t expected) const {
    if (got != expected)
      fail(std::string(name) + " has " + std::to_string(got) + " " + what + ", expected " + std::to_string(expected));
  }

  // Height and width, from a list.
  void pair(const char* name, const std::vector<int64_t>& numbers) const {
    if (numbers.size() != 2)
      fail(std::string(name) + " has " + std::to_string(numbers.size()) + " numbers, expected height, width");
  }

  // x (T, N, H, W, C)
  void images(const Tensor& x) {
    shape_.N = x.size(1), shape_.H = x.size(2), shape_.W = x.size(3), shape_.C = x.size(4);
  }

  // dy (T, N, Ho, Wo, O), of the rest of the shape.
  void results(const Tensor& dy) const {
    same("dy", "images", dy.size(1), shape_.N);
    same("dy", "rows", dy.size(2), shape_.Ho());
    same("dy", "columns", dy.size(3), shape_.Wo());
    same("dy", "channels", dy.size(4), shape_.O);
  }

  Conv2dShape shape_{};

 private:
  static std::string size_text(int64_t rows, int64_t columns) {
    return std::to_string(rows) + " x " + std::to_string(columns);
  }
};

// Points to a task's elements.
template <class T>
void set(const T*& pointer, const Input& input, int64_t task) {
  pointer = input.at<T>(task);
}
template <class T>
void set(T*& pointer, const Tensor& tensor, int64_t task) {
  pointer = static_cast<T*>(tensor.mutable_data_ptr()) + task * tensor.stride(0);
}

const Conv2dKernels& kernels() {
  return chosen(avx512::conv2d_kernels, avx2::conv2d_kernels, baseline::conv2d_kernels);
}

// Calls a kernel for parts of `count` items of each task of `like`: kernel_of(ops of T), fill(job, task). How they are
// cut depends on sizes alone.
template <class KernelOf, class Fill>
void run(const Tensor& like, int64_t count, const Conv2dShape& s, KernelOf kernel_of, Fill fill) {
  constexpr int64_t kParts = 8;  // of a call, where there are fewer tasks
  const int64_t tasks = like.size(0);
  if (tasks == 0 || count == 0) return;
  const double flops =
      2.0 * static_cast<double>(tasks * s.N * s.Ho() * s.Wo()) * static_cast<double>(s.O * s.C * s.KH * s.KW);
  const bool worth_threads = flops >= kParallelFlops;
  const int64_t parts = worth_threads ? std::min(count, ceil_div(kParts, tasks)) : 1;
  with_type(like, [&](auto type) {
    using T = decltype(type);
    const auto kernel = kernel_of(kernels().of<T>());
    run_in_parallel(tasks * parts, worth_threads, [&](int64_t i, int64_t) {
      Conv2dJob<T> job;
      job.shape = s, job.begin = count * (i % parts) / parts, job.end = count * (i % parts + 1) / parts;
      fill(job, i / parts);
      kernel(job);
    });
  });
}

Tensor conv2d(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  Conv2dOperands operands("conv2d", "x", x, kImages, stride, padding);
  operands.other("weight", weight, kWeights);
  Conv2dShape& s = operands.shape_;
  operands.images(x);
  operands.same("weight", "in channels", weight.size(2), s.C);
  s.O = weight.size(1), s.KH = weight.size(3), s.KW = weight.size(4);
  operands.shape();
  const Input in_x(x), in_weight(weight);
  Tensor y = new_tensor(x, {x.size(0), s.N, s.Ho(), s.Wo(), s.O});
  run(
      x, s.N, s, [](const auto& ops) { return ops.forward; },
      [&](auto& job, int64_t t) {
        set(job.x, in_x, t);
        set(job.weight, in_weight, t);
        set(job.y, y, t);
      });
  return y;
}

Tensor conv2d_input(const Tensor& dy, const Tensor& weight, const std::vector<int64_t>& size, int64_t stride,
                    int64_t padding) {
  Conv2dOperands operands("conv2d_input", "dy", dy, kResults, stride, padding);
  operands.other("weight", weight, kWeights);
  Conv2dShape& s = operands.shape_;
  operands.pair("size", size);
  s = {dy.size(1),     size[0],        size[1],  weight.size(2), weight.size(1),
       weight.size(3), weight.size(4), s.stride, s.padding};
  operands.shape();
  operands.results(dy);
  const Input in_dy(dy), in_weight(weight);
  Tensor dx = new_tensor(dy, {dy.size(0), s.N, s.H, s.W, s.C});
  run(
      dy, s.N, s, [](const auto& ops) { return ops.input; },
      [&](auto& job, int64_t t) {
        set(job.dy, in_dy, t);
        set(job.weight, in_weight, t);
        set(job.dx, dx, t);
      });
  return dx;
}

Tensor conv2d_weight(const Tensor& x, const Tensor& dy, const std::vector<int64_t>& kernel_size, int64_t stride,
                     int64_t padding) {
  Conv2dOperands operands("conv2d_weight", "x", x, kImages, stride, padding);
  operands.other("dy", dy, kResults);
  Conv2dShape& s = operands.shape_;
  operands.images(x);
  operands.pair("kernel_size", kernel_size);
  s.O = dy.size(4), s.KH = kernel_size[0], s.KW = kernel_size[1];
  operands.shape();
  operands.results(dy);
  const Input in_x(x), in_dy(dy);
  Tensor dweight = new_tensor(x, {x.size(0), s.O, s.C, s.KH, s.KW});
  if (s.N == 0) {
    torch::stable::zero_(dweight);
    return dweight;
  }
  run(
      x, s.KH * s.KW * s.C, s, [](const auto& ops) { return ops.weight; },
      [&](auto& job, int64_t t) {
        set(job.x, in_x, t);
        set(job.dy, in_dy, t);
        set(job.dweight, dweight, t);
      });
  return dweight;
}

}  // namespace

}  // namespace kfo::cpu

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&kfo::cpu::conv2d));
  m.impl("conv2d_input", TORCH_BOX(&kfo::cpu::conv2d_input));
  m.impl("conv2d_weight", TORCH_BOX(&kfo::cpu::conv2d_weight));
}
