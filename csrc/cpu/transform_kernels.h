// Arguments of a transform kernel, and the table of kernels of each instruction set. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_table.h"
#include "prefetch.h"

namespace kfo::cpu {

// The matrices of one problem in a packed operand: row r of B is data + (r / B) * task_stride + (r % B) * p * q, so
// that rows may run on over the tasks where these share their factors. Null data: the operand is absent, or not wanted.
template <class T>
struct Matrices {
  T* data = nullptr;
  int64_t task_stride = 0;
};

// One chunk of one problem. Gradients of factors are written, not added to.
template <class T>
struct Job {
  int64_t B = 0, p = 0, q = 0;
  int64_t begin = 0, end = 0;
  const T *R = nullptr, *L = nullptr, *ddR = nullptr, *ddL = nullptr;
  Matrices<const T> G, dY, ddG;
  Matrices<const T> bias;  // p * q elements a task
  Matrices<T> Y, dG, ddY;
  T *dR = nullptr, *dL = nullptr;
  PrefetchQueue* prefetch = nullptr;  // prefetched meanwhile
};

template <class T>
struct OrderKernels {
  void (*forward)(const Job<T>&);
  void (*backward)(const Job<T>&);
  void (*double_backward)(const Job<T>&);
};

using TransformKernels = KernelTable<OrderKernels>;

namespace avx512 {
extern const TransformKernels transform_kernels;
}
namespace avx2 {
extern const TransformKernels transform_kernels;
}
namespace baseline {
extern const TransformKernels transform_kernels;
}

}  // namespace kfo::cpu
