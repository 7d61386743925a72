// What the checks of every op share: dtypes, devices, dimensions and rows, and the text of their errors.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace kfo {

namespace detail {

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

inline std::string dtype_name(ScalarType dtype) {
  return dtype == ScalarType::Float ? "float32" : dtype == ScalarType::Double ? "float64" : "another dtype";
}

}  // namespace detail

// Messages name the op, the operand, what was expected and what came.
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

}  // namespace kfo
