// The convolution of each task's images with its own weights and its two gradients on the CPU: outputs, threads and
// registration. The three are each other's derivatives.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../check_conv2d.h"
#include "../integers.h"
#include "../tensors.h"
#include "conv2d_kernels.h"
#include "isa.h"
#include "parallel.h"

namespace kfo::cpu {

namespace {

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

// Calls a kernel for parts of `count` items of each task of `like`, of at least `least` where there are so many:
// kernel_of(ops of T), fill(job, task). How they are cut depends on sizes alone.
template <class KernelOf, class Fill>
void run(const Tensor& like, int64_t count, int64_t least, const Conv2dShape& s, KernelOf kernel_of, Fill fill) {
  constexpr int64_t kParts = 8;  // of a call, where there are fewer tasks
  const int64_t tasks = like.size(0);
  if (tasks == 0 || count == 0) return;
  const double flops =
      2.0 * static_cast<double>(tasks * s.N * s.Ho() * s.Wo()) * static_cast<double>(s.O * s.C * s.KH * s.KW);
  const bool worth_threads = flops >= kParallelFlops;
  const int64_t parts = worth_threads ? std::clamp<int64_t>(count / least, 1, ceil_div(kParts, tasks)) : 1;
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
  const Conv2dShape s = check_conv2d(x, weight, stride, padding);
  const Input in_x(x), in_weight(weight);
  Tensor y = new_tensor(x, {x.size(0), s.N, s.Ho(), s.Wo(), s.O});
  run(
      x, s.N, 1, s, [](const auto& ops) { return ops.forward; },
      [&](auto& job, int64_t t) {
        set(job.x, in_x, t);
        set(job.weight, in_weight, t);
        set(job.y, y, t);
      });
  return y;
}

Tensor conv2d_input(const Tensor& dy, const Tensor& weight, const std::vector<int64_t>& size, int64_t stride,
                    int64_t padding) {
  const Conv2dShape s = check_conv2d_input(dy, weight, size, stride, padding);
  const Input in_dy(dy), in_weight(weight);
  Tensor dx = new_tensor(dy, {dy.size(0), s.N, s.H, s.W, s.C});
  run(
      dy, s.N, 1, s, [](const auto& ops) { return ops.input; },
      [&](auto& job, int64_t t) {
        set(job.dy, in_dy, t);
        set(job.weight, in_weight, t);
        set(job.dx, dx, t);
      });
  return dx;
}

Tensor conv2d_weight(const Tensor& x, const Tensor& dy, const std::vector<int64_t>& kernel_size, int64_t stride,
                     int64_t padding) {
  const Conv2dShape s = check_conv2d_weight(x, dy, kernel_size, stride, padding);
  const Input in_x(x), in_dy(dy);
  Tensor dweight = new_tensor(x, {x.size(0), s.O, s.C, s.KH, s.KW});
  if (s.N == 0) {
    torch::stable::zero_(dweight);
    return dweight;
  }
  // Each part reads all images: with few rows, that costs more than a thread saves.
  constexpr int64_t kLeastRows = 64;
  run(
      x, s.KH * s.KW * s.C, kLeastRows, s, [](const auto& ops) { return ops.weight; },
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
