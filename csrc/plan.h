// A group of Kronecker problems: where each lies in the packed rows, and what its orders cost in operations and bytes.
// No torch and no Python here: both libraries and the pybind11 module, hence tests and benchmarks, read this one
// definition.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace kfo {

// One Kronecker problem Y_b = R^T G_b L for b < B, with its offsets (in elements) into one packed row of each operand.
struct Problem {
  int64_t B, p, q;
  int64_t R, G, L, bias;
};

struct Group {
  std::vector<Problem> problems;
  // Elements of one packed row: sums of p*p, B*p*q, q*q and p*q.
  int64_t R = 0, G = 0, L = 0, bias = 0;
};

enum class Order { forward = 1, backward = 2, double_backward = 3 };

inline std::string shape_text(const std::vector<int64_t>& shapes) {
  std::string text = "[";
  for (size_t i = 0; i + 2 < shapes.size(); i += 3) {
    if (i) text += ", ";
    text += "(" + std::to_string(shapes[i]) + ", " + std::to_string(shapes[i + 1]) + ", " +
            std::to_string(shapes[i + 2]) + ")";
  }
  return text + "]";
}

namespace detail {
// a * b, or an error when the packed row would not be addressable.
inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_mul_overflow(a, b, &out))
    throw std::invalid_argument("shapes: a problem is too large to address with 64 bits");
  return out;
}
inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t out;
  if (__builtin_add_overflow(a, b, &out))
    throw std::invalid_argument("shapes: the group is too large to address with 64 bits");
  return out;
}
}  // namespace detail

// The group described by flat (B, p, q) triples. Throws std::invalid_argument on anything but positive triples.
inline Group make_group(const std::vector<int64_t>& shapes) {
  using detail::checked_add;
  using detail::checked_mul;
  if (shapes.size() % 3 != 0)
    throw std::invalid_argument("shapes: expected (B, p, q) triples, got " + std::to_string(shapes.size()) +
                                " integers");
  Group group;
  group.problems.reserve(shapes.size() / 3);
  for (size_t i = 0; i < shapes.size(); i += 3) {
    const int64_t B = shapes[i], p = shapes[i + 1], q = shapes[i + 2];
    if (B < 1 || p < 1 || q < 1)
      throw std::invalid_argument("shapes: B, p and q must be at least 1, got " + shape_text({B, p, q}));
    group.problems.push_back({B, p, q, group.R, group.G, group.L, group.bias});
    group.R = checked_add(group.R, checked_mul(p, p));
    group.G = checked_add(group.G, checked_mul(B, checked_mul(p, q)));
    group.L = checked_add(group.L, checked_mul(q, q));
    group.bias = checked_add(group.bias, checked_mul(p, q));
  }
  return group;
}

// Floating-point operations of one matrix of a problem: 2 per multiply-add, products shared between outputs counted
// once.
inline double flops_per_matrix(const Problem& problem, Order order) {
  const double p = static_cast<double>(problem.p), q = static_cast<double>(problem.q);
  const double left = 2 * p * p * q, right = 2 * p * q * q;
  switch (order) {
    case Order::forward:  // R^T (G L)
      return left + right;
    case Order::backward:  // M = R dY, dG = M L^T, dL = G^T M, N = G L, dR = N dY^T
      return 2 * left + 3 * right;
    case Order::double_backward:
      // M = R dY, S = ddR dY, N = G L, K = ddG L + G ddL; dG = S L^T + M ddL^T, dL = G^T S + ddG^T M,
      // dR = K dY^T, ddY = ddR^T N + R^T K
      return 5 * left + 7 * right;
  }
  throw std::invalid_argument("order: expected forward, backward or double_backward");
}

inline double flops(const Group& group, int64_t tasks, Order order) {
  double total = 0;
  for (const Problem& problem : group.problems)
    total += static_cast<double>(problem.B) * flops_per_matrix(problem, order);
  return total * static_cast<double>(tasks);
}

// Bytes that must move when every output of the order is wanted: each operand read once, each output written once.
inline double bytes(const Group& group, int64_t tasks, int64_t factor_rows, int64_t element_size, Order order) {
  const double matrices = static_cast<double>(group.G) * static_cast<double>(tasks);
  const double factors = static_cast<double>(group.R + group.L) * static_cast<double>(factor_rows);
  switch (order) {
    case Order::forward:  // reads R, L, G; writes Y
      return (2 * matrices + factors) * static_cast<double>(element_size);
    case Order::backward:  // reads R, L, G, dY; writes dR, dL, dG
      return (3 * matrices + 2 * factors) * static_cast<double>(element_size);
    case Order::double_backward:  // reads R, L, G, dY, ddR, ddL, ddG; writes dR, dL, dG, ddY
      return (5 * matrices + 3 * factors) * static_cast<double>(element_size);
  }
  throw std::invalid_argument("order: expected forward, backward or double_backward");
}

}  // namespace kfo
