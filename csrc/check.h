// Every check of an operand of the three ops, in one place: the CPU and the CUDA library both call these.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plan.h"

namespace kfo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace detail {

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline std::string dtype_name(ScalarType dtype) {
  return dtype == ScalarType::Float ? "float32" : dtype == ScalarType::Double ? "float64" : "another dtype";
}

}  // namespace detail

// What the checks of every op share. Messages name the op, the operand, what was expected and what came.
class OpChecks {
 public:
  // like: the operand that fixes dtype and device. Both it and the names must outlive this.
  OpChecks(const char* op, const char* like_name, const Tensor& like)
      : like_(like), op_(op), like_name_(like_name), dtype_(like.scalar_type()) {
    if (dtype_ != ScalarType::Float && dtype_ != ScalarType::Double)
      fail(std::string(like_name) + " has " + detail::dtype_name(dtype_) + ", expected float32 or float64");
  }

  void alike(const char* name, const Tensor& tensor) const {
    if (tensor.scalar_type() != dtype_)
      fail(std::string(name) + " has " + detail::dtype_name(tensor.scalar_type()) + ", but " + like_name_ + " has " +
           detail::dtype_name(dtype_) + ": expected one dtype");
    if (tensor.is_cpu() != like_.is_cpu() || tensor.get_device_index() != like_.get_device_index())
      fail(std::string(name) + " is on " + detail::device_name(tensor) + ", but " + like_name_ + " is on " +
           detail::device_name(like_) + ": expected one device");
  }

  void dimensions(const char* name, const Tensor& tensor, int64_t expected, const char* layout) const {
    if (tensor.dim() != expected)
      fail(std::string(name) + " has " + std::to_string(tensor.dim()) + " dimensions, expected " +
           std::to_string(expected) + ": " + layout);
  }

  void rows(const char* name, const Tensor& tensor, int64_t expected, const char* other_name) const {
    if (tensor.size(0) != expected)
      fail(std::string(name) + " has " + std::to_string(tensor.size(0)) + " rows, but " + other_name + " has " +
           std::to_string(expected));
  }

  // One row for each task, or one that all tasks share.
  void rows_or_one(const char* name, const Tensor& tensor, int64_t tasks) const {
    const int64_t rows = tensor.size(0);
    if (rows != 1 && rows != tasks)
      fail(std::string(name) + " has " + std::to_string(rows) + " rows, but " + like_name_ + " has " +
           std::to_string(tasks) + " tasks: expected 1 or that many");
  }

  void need(const std::vector<bool>& flags, size_t expected) const {
    if (flags.size() != expected)
      fail("need has " + std::to_string(flags.size()) + " flags, expected " + std::to_string(expected));
  }

 protected:
  [[noreturn]] void fail(const std::string& message) const { throw std::invalid_argument(op_ + (": " + message)); }

  const Tensor& like_;

 private:
  const char* op_;
  const char* like_name_;
  ScalarType dtype_;
};

// Checks the operands of one op against its group.
class Operands : public OpChecks {
 public:
  // G: (T, sum B*p*q), the operand that fixes tasks, dtype and device.
  Operands(const char* op, const std::vector<int64_t>& shapes, const Group& group, const Tensor& G)
      : OpChecks(op, "G", G), shapes_(shapes), group_(group) {
    columns("G", G, group.G);
    tasks_ = G.size(0);
  }

  int64_t tasks() const { return tasks_; }

  // A factor or bias: (T, columns), or (1, columns) shared by all tasks.
  void factor(const char* name, const Tensor& tensor, int64_t expected_columns) const {
    alike(name, tensor);
    columns(name, tensor, expected_columns);
    rows_or_one(name, tensor, tasks_);
  }

  // A tensor laid out like G: (T, sum B*p*q).
  void matrices(const char* name, const Tensor& tensor) const {
    alike(name, tensor);
    columns(name, tensor, group_.G);
    rows(name, tensor, tasks_, "G");
  }

  // The cotangent of a cotangent: exactly the shape of the factor it belongs to.
  void like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other,
            int64_t expected_columns) const {
    alike(name, tensor);
    columns(name, tensor, expected_columns);
    rows(name, tensor, other.size(0), other_name);
  }

 private:
  void columns(const char* name, const Tensor& tensor, int64_t expected) const {
    dimensions(name, tensor, 2, "(tasks, columns)");
    if (tensor.size(1) != expected)
      fail(std::string(name) + " has " + std::to_string(tensor.size(1)) + " columns, but shapes " +
           shape_text(shapes_) + " need " + std::to_string(expected));
  }

  const std::vector<int64_t>& shapes_;
  const Group& group_;
  int64_t tasks_ = 0;
};

// Each returns T after checking every operand of its op.
inline int64_t check_transform(const Group& group, const std::vector<int64_t>& shapes, const Tensor& R, const Tensor& G,
                               const Tensor& L, const std::optional<Tensor>& bias) {
  const Operands operands("transform", shapes, group, G);
  operands.factor("R", R, group.R);
  operands.factor("L", L, group.L);
  if (bias) operands.factor("bias", *bias, group.bias);
  return operands.tasks();
}

inline int64_t check_transform_backward(const Group& group, const std::vector<int64_t>& shapes, const Tensor& R,
                                        const Tensor& G, const Tensor& L, const Tensor& dY,
                                        const std::vector<bool>& need) {
  const Operands operands("transform_backward", shapes, group, G);
  operands.factor("R", R, group.R);
  operands.factor("L", L, group.L);
  operands.matrices("dY", dY);
  operands.need(need, 3);
  return operands.tasks();
}

inline int64_t check_transform_double_backward(const Group& group, const std::vector<int64_t>& shapes, const Tensor& R,
                                               const Tensor& G, const Tensor& L, const Tensor& dY,
                                               const std::optional<Tensor>& ddR, const std::optional<Tensor>& ddG,
                                               const std::optional<Tensor>& ddL, const std::vector<bool>& need) {
  const Operands operands("transform_double_backward", shapes, group, G);
  operands.factor("R", R, group.R);
  operands.factor("L", L, group.L);
  operands.matrices("dY", dY);
  if (ddR) operands.like("ddR", *ddR, "R", R, group.R);
  if (ddG) operands.matrices("ddG", *ddG);
  if (ddL) operands.like("ddL", *ddL, "L", L, group.L);
  operands.need(need, 4);
  return operands.tasks();
}

// One operand as a kernel reads it: row t starts at data + t * stride, and a row is contiguous.
template <class T>
struct Packed {
  const T* data = nullptr;
  int64_t stride = 0;
};

// A view of `tensor` whose rows are contiguous: the tensor itself (any row stride, 0 included), or else a contiguous
// copy.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The rows of `tensor`, which must have contiguous rows and outlive the result; one row is shared by all tasks.
template <class T>
Packed<T> packed(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.size(0) == 1 ? 0 : tensor.stride(0)};
}

}  // namespace kfo
