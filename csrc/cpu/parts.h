// Parts of a call, over the threads of torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "working_memory.h"

namespace kfo::cpu {

constexpr double kParallelFlops = 4e5;  // below, starting the threads costs more than they save

// Calls run(0) to run(count - 1), each once, on several threads if `flops` of work are worth it. Whoever is free takes
// the next part, so that what a part computes must not depend on who computes it.
template <class Run>
void run_parts(int64_t count, double flops, Run run) {
  if (flops < kParallelFlops) {
    for (int64_t i = 0; i < count; ++i) run(i);
  } else {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
      for (int64_t i = next++; i < count; i = next++) run(i);
      trim_scratch();
    });
  }
  trim_scratch();
}

}  // namespace kfo::cpu
