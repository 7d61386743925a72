// Every check of an operand of the three transform ops, in one place: the CPU and the CUDA library both call these.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "plan.h"

namespace kfo {

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

}  // namespace kfo
