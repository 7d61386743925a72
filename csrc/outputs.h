// New tensors: the outputs and the scratch memory of all ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

namespace kfo {

using torch::stable::Tensor;

// An uninitialised tensor of the dtype and on the device of `like`.
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  AtenTensorHandle made = nullptr;
  // torch::stable::new_empty looks the operator up by its name in every call, which doubles its time.
  const AOTITorchError error = aoti_torch_aten_new_empty(like.get(), sizes.begin(), static_cast<int64_t>(sizes.size()),
                                                         nullptr, nullptr, nullptr, 0, nullptr, &made);
  // The operators' kernel in Python knows by this name that memory ran out.
  if (error) throw std::runtime_error("aten::new_empty failed");
  return Tensor(made);
}

// The same, or one of shape (0,) where the output is not needed.
inline Tensor new_output(const Tensor& like, bool needed, std::initializer_list<int64_t> sizes) {
  return needed ? new_tensor(like, sizes) : new_tensor(like, {0});
}

}  // namespace kfo
