// Division of numbers by one that a kernel divides by often: a multiplication and a shift. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../qualifiers.h"

namespace kfo::cuda {

// Of numbers below 2^31.
struct Divisor {
  uint32_t by = 1, multiplier = 0;  // 2^shift / by, rounded up: its error times a number below 2^31 stays below 1 / by
  int32_t shift = 31;

  Divisor() = default;
  __host__ __device__ constexpr explicit Divisor(uint32_t by_) : by(by_) {
    while ((uint64_t{1} << (shift - 31)) < by) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }

  __host__ __device__ constexpr int quotient(int n) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> shift);
  }
};

// In four bytes: of numbers whose product with the divisor is below 2^31, as of all that index shared memory.
struct SmallDivisor {
  uint32_t multiplier = 0;  // 2^31 / by, rounded up: its error times such a number stays below 2^31 / by

  SmallDivisor() = default;
  __host__ __device__ constexpr explicit SmallDivisor(uint32_t by)
      : multiplier(static_cast<uint32_t>(((uint64_t{1} << 31) + by - 1) / by)) {}

  __host__ __device__ constexpr int quotient(int n) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> 31);
  }
};

}  // namespace kfo::cuda
