// Tensors as kernels take them: operands, new outputs, scratch memory, and the C++ type of their elements.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "huge_pages.h"
#include "packed_rows.h"

namespace kfo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor itself where each task's elements are contiguous, at whatever distance the tasks lie; else a copy.
inline Tensor contiguous_tasks(const Tensor& tensor) {
  int64_t expected = 1;
  for (int64_t d = tensor.dim() - 1; d > 0; --d) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return torch::stable::contiguous(tensor);
    expected *= tensor.size(d);
  }
  return tensor;
}

// An operand whose tasks are contiguous, which it keeps alive; absent if there is no tensor.
class Input {
 public:
  explicit Input(const std::optional<Tensor>& tensor) {
    if (tensor) tensor_ = contiguous_tasks(*tensor);
  }

  // A single row is that of every task.
  template <class T>
  PackedRows<const T> rows() const {
    if (!tensor_) return {};
    return {static_cast<const T*>(tensor_->const_data_ptr()), tensor_->size(0) == 1 ? 0 : tensor_->stride(0)};
  }

  // An element of a task's row; null if absent.
  template <class T>
  const T* at(int64_t task, int64_t element = 0) const {
    const PackedRows<const T> all = rows<T>();
    return all.data ? all.data + task * all.stride + element : nullptr;
  }

 private:
  std::optional<Tensor> tensor_;
};

// An uninitialised tensor of the dtype and on the device of `like`, of at most five dimensions.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const bool on_cpu = like.is_cpu();
  const auto dims = static_cast<int64_t>(sizes.size());
  AtenTensorHandle made = nullptr;
  AOTITorchError error = 0;
  if (on_cpu) {
    // The allocator itself: the dispatcher would pass through two operators.
    std::array<int64_t, 5> strides{};
    uint64_t stride = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      strides[d] = static_cast<int64_t>(stride);
      stride *= static_cast<uint64_t>(std::max<int64_t>(sizes.begin()[d], 1));
    }
    int32_t dtype = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    error =
        aoti_torch_empty_strided(dims, sizes.begin(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made);
  } else {
    // torch::stable::new_empty looks the operator up by its name in every call, which doubles its time.
    error = aoti_torch_aten_new_empty(like.get(), sizes.begin(), dims, nullptr, nullptr, nullptr, 0, nullptr, &made);
  }
  // The operators' kernel in Python recognises by this message that memory ran out.
  if (error) throw std::runtime_error("aten::new_empty failed");
  Tensor tensor(made);
  if (on_cpu) advise_huge_pages(tensor.const_data_ptr(), static_cast<size_t>(tensor.numel()) * tensor.element_size());
  return tensor;
}

// The same, or one of shape (0,) where the output is not needed. Outputs have two dimensions or more.
inline Tensor new_output(const Tensor& like, bool needed, std::initializer_list<int64_t> sizes) {
  return needed ? new_tensor(like, sizes) : new_tensor(like, {0});
}

// The elements of an output of `new_output`; null where it is not needed.
template <class T>
T* written(const Tensor& output) {
  return output.dim() == 1 ? nullptr : static_cast<T*>(output.mutable_data_ptr());
}

// Calls run(T{}) with the C++ type of a checked tensor's elements.
template <class Run>
void with_type(const Tensor& tensor, Run run) {
  if (tensor.scalar_type() == ScalarType::Float)
    run(float{});
  else
    run(double{});
}

}  // namespace kfo
