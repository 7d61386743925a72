// Compiled once for each instruction set, as transform_kernels.cpp is.
#include "fma_kernels.h"

#include "vec.h"

namespace {

// More sums in flight than any processor's latency times its units, and few enough to stay in 16 registers.
constexpr int kSums = 12;

float run(int64_t steps) {
  const Vec<float> a = broadcast(0.5f), b = broadcast(1.0f);
  Vec<float> sums[kSums];
#pragma GCC unroll 16
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      sums[i] = multiply_add(sums[i], a, b);
      // Otherwise the compiler may take several steps of one sum at once.
      asm("" : "+x"(sums[i]));
    }
  }
  Vec<float> total = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < kSums; ++i) total += sums[i];
  return total[0];
}

}  // namespace

namespace kfo::cpu::KFO_ISA {

const FmaKernel fma_kernel = {run, 2 * kSums * kLanes<float>};

}  // namespace kfo::cpu::KFO_ISA
