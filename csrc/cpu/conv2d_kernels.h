// Arguments of a convolution kernel, and the table of kernels of each instruction set. No torch here.
#pragma once

#include <cstdint>

#include "../conv2d.h"
#include "kernel_table.h"

namespace kfo::cpu {

// Part of one task's work: images begin to end of y or of dx; of dweight, columns (channel, row of KH, column of KW).
template <class T>
struct Conv2dJob {
  Conv2dShape shape;
  int64_t begin = 0, end = 0;
  const T *x = nullptr, *weight = nullptr, *dy = nullptr;
  T *y = nullptr, *dx = nullptr, *dweight = nullptr;
};

template <class T>
struct Conv2dOps {
  void (*forward)(const Conv2dJob<T>&);
  void (*input)(const Conv2dJob<T>&);
  void (*weight)(const Conv2dJob<T>&);
};

using Conv2dKernels = KernelTable<Conv2dOps>;

namespace avx512 {
extern const Conv2dKernels conv2d_kernels;
}
namespace avx2 {
extern const Conv2dKernels conv2d_kernels;
}
namespace baseline {
extern const Conv2dKernels conv2d_kernels;
}

}  // namespace kfo::cpu
