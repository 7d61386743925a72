// Every check of an operand of the three convolution ops, in one place: the CPU and the CUDA library both call these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "conv2d.h"

namespace kfo {

constexpr int64_t kMostPadding = int64_t{1} << 60;  // twice that, and a size beside it, can be added

// Checks the two operands of one op.
class Conv2dOperands : public OpChecks {
 public:
  static constexpr const char* kImages = "(tasks, images, height, width, channels)";
  static constexpr const char* kResults = "(tasks, images, height, width, out channels)";
  static constexpr const char* kWeights = "(tasks, out channels, in channels, height, width)";

  Conv2dOperands(const char* op, const char* like_name, const Tensor& like, const char* layout, int64_t stride,
                 int64_t padding)
      : OpChecks(op, like_name, like) {
    if (stride < 1) fail("stride: expected at least 1, got " + std::to_string(stride));
    if (padding < 0 || padding > kMostPadding)
      fail("padding: expected from 0 to " + std::to_string(kMostPadding) + ", got " + std::to_string(padding));
    shape_.stride = stride, shape_.padding = padding;
    dimensions(like_name, like, 5, layout);
  }

  void other(const char* name, const Tensor& tensor, const char* layout) const {
    dimensions(name, tensor, 5, layout);
    alike(name, tensor);
    same(name, "tasks", tensor.size(0), like_.size(0));
  }

  // The whole shape: that there is something to compute with, and that it can be addressed.
  void shape() {
    Conv2dShape& s = shape_;
    for (const auto& [what, size] :
         {std::pair{"height", s.H}, {"width", s.W}, {"in channels", s.C}, {"out channels", s.O}})
      if (size < 1) fail(std::string(what) + ": expected at least 1, got " + std::to_string(size));
    if (std::max(s.H, s.W) > kMostPadding)
      fail("images of " + size_text(s.H, s.W) + " are too large to address with 64 bits");
    if (s.KH < 1 || s.KW < 1 || s.H + 2 * s.padding < s.KH || s.W + 2 * s.padding < s.KW)
      fail("a kernel of " + size_text(s.KH, s.KW) + " does not fit images of " + size_text(s.H, s.W) +
           " with padding " + std::to_string(s.padding));
    // A stride beyond the padded image leaves one result, as that of its size does.
    s.stride = std::min(s.stride, std::max(s.H, s.W) + 2 * s.padding);
    const double results = static_cast<double>(s.Ho()) * static_cast<double>(s.Wo());
    const double taps = static_cast<double>(s.KH) * static_cast<double>(s.KW);
    if (results * taps * static_cast<double>(s.C) * sizeof(double) > 0x1p62)
      fail("padding: " + std::to_string(s.padding) + " makes results of " + size_text(s.Ho(), s.Wo()) +
           ", too large to address with 64 bits");
  }

  void same(const char* name, const char* what, int64_t got, int64_t expected) const {
    if (got != expected)
      fail(std::string(name) + " has " + std::to_string(got) + " " + what + ", expected " + std::to_string(expected));
  }

  // Height and width, from a list.
  void pair(const char* name, const std::vector<int64_t>& numbers) const {
    if (numbers.size() != 2)
      fail(std::string(name) + " has " + std::to_string(numbers.size()) + " numbers, expected height, width");
  }

  // x (T, N, H, W, C)
  void images(const Tensor& x) {
    shape_.N = x.size(1), shape_.H = x.size(2), shape_.W = x.size(3), shape_.C = x.size(4);
  }

  // dy (T, N, Ho, Wo, O), of the rest of the shape.
  void results(const Tensor& dy) const {
    same("dy", "images", dy.size(1), shape_.N);
    same("dy", "rows", dy.size(2), shape_.Ho());
    same("dy", "columns", dy.size(3), shape_.Wo());
    same("dy", "channels", dy.size(4), shape_.O);
  }

  Conv2dShape shape_{};

 private:
  static std::string size_text(int64_t rows, int64_t columns) {
    return std::to_string(rows) + " x " + std::to_string(columns);
  }
};

// Each returns the sizes of a task's convolution after checking every operand of its op.
inline Conv2dShape check_conv2d(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  Conv2dOperands operands("conv2d", "x", x, Conv2dOperands::kImages, stride, padding);
  operands.other("weight", weight, Conv2dOperands::kWeights);
  Conv2dShape& s = operands.shape_;
  operands.images(x);
  operands.same("weight", "in channels", weight.size(2), s.C);
  s.O = weight.size(1), s.KH = weight.size(3), s.KW = weight.size(4);
  operands.shape();
  return s;
}

inline Conv2dShape check_conv2d_input(const Tensor& dy, const Tensor& weight, const std::vector<int64_t>& size,
                                      int64_t stride, int64_t padding) {
  Conv2dOperands operands("conv2d_input", "dy", dy, Conv2dOperands::kResults, stride, padding);
  operands.other("weight", weight, Conv2dOperands::kWeights);
  Conv2dShape& s = operands.shape_;
  operands.pair("size", size);
  s = {dy.size(1),     size[0],        size[1],  weight.size(2), weight.size(1),
       weight.size(3), weight.size(4), s.stride, s.padding};
  operands.shape();
  operands.results(dy);
  return s;
}

inline Conv2dShape check_conv2d_weight(const Tensor& x, const Tensor& dy, const std::vector<int64_t>& kernel_size,
                                       int64_t stride, int64_t padding) {
  Conv2dOperands operands("conv2d_weight", "x", x, Conv2dOperands::kImages, stride, padding);
  operands.other("dy", dy, Conv2dOperands::kResults);
  Conv2dShape& s = operands.shape_;
  operands.images(x);
  operands.pair("kernel_size", kernel_size);
  s.O = dy.size(4), s.KH = kernel_size[0], s.KW = kernel_size[1];
  operands.shape();
  operands.results(dy);
  return s;
}

}  // namespace kfo
