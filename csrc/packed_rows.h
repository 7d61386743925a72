// A row for each task, as kernels read or write them. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace kfo {

// The contiguous row of task t starts at data + t * stride; stride 0: one row for all tasks. Null data: an absent
// operand, or an output that is not needed.
template <class T>
struct PackedRows {
  T* data = nullptr;
  int64_t stride = 0;
};

}  // namespace kfo
