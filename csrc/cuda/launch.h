// What the three ops share on the host: operands and outputs as the kernels see them, and launches on torch's stream.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // torch's stable headers declare their CUDA functions under it
#endif

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../check.h"
#include "block.cuh"
#include "schedule.h"
#include "sum.cuh"

namespace kfo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An operand with contiguous rows, which it keeps alive; absent if there is no tensor.
class Input {
 public:
  explicit Input(const std::optional<Tensor>& tensor) {
    if (tensor) tensor_ = contiguous_rows(*tensor);
  }

  template <typename T>
  Operand<T> operand() const {
    if (!tensor_) return {};
    const Packed<T> rows = packed<T>(*tensor_);
    return {rows.data, rows.stride};
  }

 private:
  std::optional<Tensor> tensor_;
};

// A new (rows, columns) tensor like `like`, or one of shape (0,) if it is not needed.
inline Tensor new_output(const Tensor& like, bool needed, int64_t rows, int64_t columns) {
  if (!needed) return torch::stable::new_empty(like, {0});
  return torch::stable::new_empty(like, {rows, columns});
}

template <typename T>
Output<T> output(const Tensor& tensor) {
  if (tensor.dim() == 1) return {};
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(1)};
}

template <typename Args>
void launch(void (*kernel)(Args), int64_t blocks, int64_t shared_bytes, cudaStream_t stream, const Args& args) {
  static_assert(sizeof(Args) <= kParameterBytes, "the problem table must fit in the kernel's parameters");
  if (blocks == 0) return;
  kernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared_bytes), stream>>>(args);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// One order over the whole group, on torch's current stream, then the sums of dR and dL where they are needed. Sets the
// table and the scratch memory of `args`. `like` gives the dtype and the device, whose guard the caller holds.
template <typename T, typename Args>
void launch_order(void (*kernel)(Args), Args args, const Schedule& schedule, const Tensor& like, Output<T> dR = {},
                  Output<T> dL = {}) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  const cudaStream_t current = static_cast<cudaStream_t>(stream);
  // Freed on return but safe: torch's allocator reuses it on this stream only.
  const Tensor scratch = torch::stable::new_empty(like, {schedule.scratch});
  args.scratch = static_cast<T*>(scratch.mutable_data_ptr());
  for (const Launch& part : schedule.launches) {
    args.table = part.table;
    launch(kernel, part.blocks, part.shared_bytes, current, args);
    launch(sum_kernel<T>, part.sum_blocks, 0, current, Sum<T>{part.table, args.scratch, dR, dL});
  }
}

// f(T()) with the C++ type of a checked dtype.
template <typename F>
void with_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float)
    f(float());
  else
    f(double());
}

}  // namespace kfo::cuda
