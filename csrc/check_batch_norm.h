// Every check of an operand of the three batch norm ops, in one place: the CPU and the CUDA library both call these.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace kfo {

// Checks the operands of one op.
class BatchNormOperands : public OpChecks {
 public:
  // x: (T, N, C), the operand that fixes sizes, dtype and device.
  BatchNormOperands(const char* op, const Tensor& x) : OpChecks(op, "x", x) {
    dimensions("x", x, 3, "(tasks, rows, channels)");
    if (x.size(1) < 2)
      fail("x has " + std::to_string(x.size(1)) + " rows, expected at least 2: statistics are those of the rows");
  }

  // weight, bias: (T, C), or (1, C) shared by all tasks.
  void parameter(const char* name, const Tensor& tensor) const {
    columns(name, tensor);
    rows_or_one(name, tensor, like_.size(0));
  }

  // mean, rstd: (T, C).
  void statistic(const char* name, const Tensor& tensor) const {
    columns(name, tensor);
    rows(name, tensor, like_.size(0), "x");
  }

  // What both derivatives take.
  void saved(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& dy) const {
    parameter("weight", weight);
    parameter("bias", bias);
    statistic("mean", mean);
    statistic("rstd", rstd);
    images("dy", dy);
  }

  // A cotangent of the gradient of `other`, a parameter: exactly its shape.
  void like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    columns(name, tensor);
    rows(name, tensor, other.size(0), other_name);
  }

  // A tensor of the shape of x.
  void images(const char* name, const Tensor& tensor) const {
    alike(name, tensor);
    dimensions(name, tensor, 3, "(tasks, rows, channels)");
    for (int64_t i = 0; i < 3; ++i)
      if (tensor.size(i) != like_.size(i))
        fail(std::string(name) + " has shape " + shape(tensor) + ", but x has " + shape(like_));
  }

  void eps(double value) const {
    if (!(value > 0)) fail("eps is " + std::to_string(value) + ", expected a positive number");
  }

 private:
  static std::string shape(const Tensor& tensor) {
    std::string text = "(";
    for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
    return text + ")";
  }

  void columns(const char* name, const Tensor& tensor) const {
    alike(name, tensor);
    dimensions(name, tensor, 2, "(tasks, channels)");
    if (tensor.size(1) != like_.size(2))
      fail(std::string(name) + " has " + std::to_string(tensor.size(1)) + " channels, but x has " +
           std::to_string(like_.size(2)));
  }
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
  operands.saved(weight, bias, mean, rstd, dy);
  operands.need(need, 3);
}

inline void check_batch_norm_relu_double_backward(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                  const Tensor& mean, const Tensor& rstd, const Tensor& dy,
                                                  const std::optional<Tensor>& ddx,
                                                  const std::optional<Tensor>& ddweight,
                                                  const std::optional<Tensor>& ddbias, const std::vector<bool>& need) {
  const BatchNormOperands operands("batch_norm_relu_double_backward", x);
  operands.saved(weight, bias, mean, rstd, dy);
  if (ddx) operands.images("ddx", *ddx);
  if (ddweight) operands.like("ddweight", *ddweight, "weight", weight);
  if (ddbias) operands.like("ddbias", *ddbias, "bias", bias);
  operands.need(need, 3);
}

}  // namespace kfo
