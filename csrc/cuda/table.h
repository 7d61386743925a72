// The table of problems that travels with a launch, and the constants that host and device agree on. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../plan.h"

namespace kfo::cuda {

constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024;  // what a kernel may use without asking for more
constexpr int64_t kParameterBytes = 4096;    // of one launch
constexpr int kTableProblems = 32;

// One problem as the kernels see it. Its blocks, one per (task, chunk of B), are numbered by task, then by chunk.
struct Entry {
  Problem problem;
  int64_t chunks;              // of B, for each task
  int64_t first_block;         // in the launch of the order's kernel
  int64_t first_sum_block;     // in the launch that sums the partial dR and dL
  int64_t partials;            // scratch offset of the first block's partial dR (p, p) then dL (q, q), where needed
  int64_t partials_size;       // ... elements of one block
  int64_t intermediates;       // scratch offset of the first block's intermediates, or -1: they lie in shared memory
  int64_t intermediates_size;  // ... elements of one block
  bool staged;                 // the factors are copied to shared memory
};

struct Table {
  Entry entries[kTableProblems];
  int64_t count;
  int64_t tasks;
  // Rows of the outputs dR and dL: 0 where there is nothing to compute, 1 where the factor is shared by all tasks.
  int64_t dR_rows, dL_rows;
};

}  // namespace kfo::cuda
