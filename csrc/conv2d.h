// The sizes of a convolution of one task, for both libraries. No torch, no CUDA.
#pragma once

#include <cstdint>

namespace kfo {

// y (N, Ho, Wo, O) is the convolution of x (N, H, W, C) with weight (O, C, KH, KW); all contiguous.
struct Conv2dShape {
  int64_t N, H, W, C, O, KH, KW, stride, padding;

  int64_t Ho() const { return (H + 2 * padding - KH) / stride + 1; }
  int64_t Wo() const { return (W + 2 * padding - KW) / stride + 1; }
};

}  // namespace kfo
