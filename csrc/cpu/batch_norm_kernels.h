// Arguments of a batch norm kernel, and the table of kernels of each instruction set. No torch here.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace kfo::cpu {

// Some channels of one task, at most kBatchNormChannels of them: element (row, channel) of x and of what is shaped like
// it is at data[row * stride + channel]. Null: an absent cotangent, or an output that is not needed.
template <class T>
struct BatchNormJob {
  int64_t rows = 0, stride = 0, channels = 0;
  double eps = 0;
  bool relu = true;
  const T *x = nullptr, *dy = nullptr, *ddx = nullptr;
  const T *weight = nullptr, *bias = nullptr, *ddweight = nullptr, *ddbias = nullptr;
  const T *mean = nullptr, *rstd = nullptr;    // not read by the forward
  T *new_mean = nullptr, *new_rstd = nullptr;  // written by the forward
  T *y = nullptr, *dx = nullptr, *ddy = nullptr;
  T *dweight = nullptr, *dbias = nullptr;
};

constexpr int64_t kBatchNormChannels = 32;

template <class T>
struct BatchNormOrders {
  void (*forward)(const BatchNormJob<T>&);
  void (*backward)(const BatchNormJob<T>&);
  void (*double_backward)(const BatchNormJob<T>&);
};

using BatchNormKernels = KernelTable<BatchNormOrders>;

namespace avx512 {
extern const BatchNormKernels batch_norm_kernels;
}
namespace avx2 {
extern const BatchNormKernels batch_norm_kernels;
}
namespace baseline {
extern const BatchNormKernels batch_norm_kernels;
}

}  // namespace kfo::cpu
