// Every check of an operand of the three batch norm ops, in one place: the CPU and the CUDA library both call these.
#pragma once

#include "check.h"

namespace kfo {

// Checks the operands of one op. Messages name the op, the operand, what was expected and what came.
class BatchNormOperands {
 public:
  // x: (T, N, C), the operand that fixes sizes, dtype and device.
  BatchNormOperands(const char* op, const Tensor& x) : op_(op), x_(x), dtype_(x.scalar_type()) {
    if (dtype_ != ScalarType::Float && dtype_ != ScalarType::Double)
      fail("x has " + detail::dtype_name(dtype_) + ", expected float32 or float64");
    if (x.dim() != 3) fail("x has " + std::to_string(x.dim()) + " dimensions, expected 3: (tasks, rows, channels)");
    if (x.size(1) == 0) fail("x has no rows, expected at least 1: statistics are those of the rows");
  }

  // weight, bias: (T, C), or (1, C) shared by all tasks.
  void parameter(const char* name, const Tensor& tensor) const {
    columns(name, tensor);
    if (tensor.size(0) != 1 && tensor.size(0) != x_.size(0))
      fail(std::string(name) + " has " + std::to_string(tensor.size(0)) + " rows, but x has " +
           std::to_string(x_.size(0)) + " tasks: expected 1 or that many");
  }

  // mean, rstd: (T, C).
  void statistic(const char* name, const Tensor& tensor) const {
    columns(name, tensor);
    rows(name, tensor, x_.size(0), "x");
  }

  // A cotangent of the gradient of `other`, a parameter: exactly its shape.
  void like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    columns(name, tensor);
    rows(name, tensor, other.size(0), other_name);
  }

  // A tensor of the shape of x.
  void images(const char* name, const Tensor& tensor) const {
    alike(name, tensor);
    if (tensor.dim() != 3) fail(std::string(name) + " has " + std::to_string(tensor.dim()) + " dimensions, expected 3");
    for (int64_t i = 0; i < 3; ++i)
      if (tensor.size(i) != x_.size(i))
        fail(std::string(name) + " has shape " + shape(tensor) + ", but x has " + shape(x_));
  }

  void eps(double value) const {
    if (!(value > 0)) fail("eps is " + std::to_string(value) + ", expected a positive number");
  }

  void need(const std::vector<bool>& flags, size_t expected) const {
    if (flags.size() != expected)
      fail("need has " + std::to_string(flags.size()) + " flags, expected " + std::to_string(expected));
  }

 private:
  [[noreturn]] void fail(const std::string& message) const { throw std::invalid_argument(op_ + (": " + message)); }

  static std::string shape(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + ")";
  }

  void alike(const char* name, const Tensor& tensor) const {
    if (tensor.scalar_type() != dtype_)
      fail(std::string(name) + " has " + detail::dtype_name(tensor.scalar_type()) + ", but x has " +
           detail::dtype_name(dtype_) + ": expected one dtype");
    if (tensor.is_cpu() != x_.is_cpu() || tensor.get_device_index() != x_.get_device_index())
      fail(std::string(name) + " is on " + detail::device_name(tensor) + ", but x is on " + detail::device_name(x_) +
           ": expected one device");
  }

  void columns(const char* name, const Tensor& tensor) const {
    alike(name, tensor);
    if (tensor.dim() != 2)
      fail(std::string(name) + " has " + std::to_string(tensor.dim()) + " dimensions, expected 2: (tasks, channels)");
    if (tensor.size(1) != x_.size(2))
      fail(std::string(name) + " has " + std::to_string(tensor.size(1)) + " channels, but x has " +
           std::to_string(x_.size(2)));
  }

  void rows(const char* name, const Tensor& tensor, int64_t expected, const char* other_name) const {
    if (tensor.size(0) != expected)
      fail(std::string(name) + " has " + std::to_string(tensor.size(0)) + " rows, but " + other_name + " has " +
           std::to_string(expected));
  }

  const char* op_;
  const Tensor& x_;
  ScalarType dtype_;
};

inline void check_batch_norm_relu(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  const BatchNormOperands operands("batch_norm_relu", x);
  operands.parameter("weight", weight);
  operands.parameter("bias", bias);
  operands.eps(eps);
}

inline void check_batch_norm_relu_backward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                           const Tensor& mean, const Tensor& rstd, const Tensor& dy,
                                           const std::vector<bool>& need) {
  const BatchNormOperands operands("batch_norm_relu_backward", x);
  operands.parameter("weight", weight);
  operands.parameter("bias", bias);
  operands.statistic("mean", mean);
  operands.statistic("rstd", rstd);
  operands.images("dy", dy);
  operands.need(need, 3);
}

inline void check_batch_norm_relu_double_backward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  const Tensor& mean, const Tensor& rstd, const Tensor& dy,
                                                  const std::optional<Tensor>& ddx,
                                                  const std::optional<Tensor>& ddweight,
                                                  const std::optional<Tensor>& ddbias, const std::vector<bool>& need) {
  const BatchNormOperands operands("batch_norm_relu_double_backward", x);
  operands.parameter("weight", weight);
  operands.parameter("bias", bias);
  operands.statistic("mean", mean);
  operands.statistic("rstd", rstd);
  operands.images("dy", dy);
  if (ddx) operands.images("ddx", *ddx);
  if (ddweight) operands.like("ddweight", *ddweight, "weight", weight);
  if (ddbias) operands.like("ddbias", *ddbias, "bias", bias);
  operands.need(need, 3);
}

}  // namespace kfo
