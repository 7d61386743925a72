// Multiply-adds without memory, for each instruction set: the rate that benchmarks hold its kernels against.
#pragma once

#include <cstdint>

namespace kfo::cpu {

struct FmaKernel {
  float (*run)(int64_t steps);
  int flops_per_step;
};

namespace avx512 {
extern const FmaKernel fma_kernel;
}
namespace avx2 {
extern const FmaKernel fma_kernel;
}
namespace baseline {
extern const FmaKernel fma_kernel;
}

}  // namespace kfo::cpu
