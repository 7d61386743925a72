// Integer arithmetic of the host and of kernels. No torch, no CUDA. Always inlined: the CPU kernels are compiled for
// each instruction set, and the linker must not find one's code for another.
#pragma once

#include <cstdint>

#include "qualifiers.h"

#define KFO_INLINE __host__ __device__ constexpr __attribute__((always_inline))

namespace kfo {

// In the arithmetic of I, hence of 32 bits for two ints: a product of results may need ceil_div<int64_t>.
template <class I>
KFO_INLINE I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

KFO_INLINE int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

KFO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace kfo

#undef KFO_INLINE
