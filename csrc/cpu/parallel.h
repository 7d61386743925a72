// Dynamic scheduling of the parts of a call over the threads of torch.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "thread_scratch.h"

namespace kfo::cpu {

constexpr double kParallelFlops = 4e5;  // below, starting the threads costs more than they save
constexpr int64_t kPlenty = 4;          // parts for each thread

// Calls run(part, following) for parts 0 to count - 1, each once, on several threads if that is worth it. Whoever is
// free takes the next part, so that what a part computes must not depend on who computes it. `following` is the part
// that the same thread goes on with, which it takes early while plenty are left for the others; after that it is a
// guess. It may be `count` or more.
template <class Run>
void run_in_parallel(int64_t count, bool worth_threads, Run run) {
  if (!worth_threads) {
    for (int64_t i = 0; i < count; ++i) run(i, i + 1);
  } else {
    std::atomic<int64_t> next{0}, threads{0};
    torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
      ++threads;
      for (int64_t i = next++; i < count;) {
        const bool plenty = next + kPlenty * threads < count;
        const int64_t following = plenty ? next++ : i + threads;
        run(i, following);
        i = plenty ? following : next++;
      }
      trim_scratch();
    });
  }
  trim_scratch();
}

}  // namespace kfo::cpu
