#include <stdexcept>

#include "fma_kernels.h"
#include "isa.h"

// Runs `steps` steps of float32 multiply-adds on the calling thread. Returns the number of operations, 2 for each, or 0
// if KFO_CPU_ISA names an instruction set that is not available.
extern "C" __attribute__((visibility("default"))) double kfo_cpu_fma(int64_t steps) {
  using namespace kfo::cpu;
  try {
    const FmaKernel& kernel = chosen(avx512::fma_kernel, avx2::fma_kernel, baseline::fma_kernel);
    [[maybe_unused]] static volatile float sink;  // the result is used: nothing may be left out
    sink = kernel.run(steps);
    return static_cast<double>(steps) * kernel.flops_per_step;
  } catch (const std::invalid_argument&) {
    return 0;
  }
}
