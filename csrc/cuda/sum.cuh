// dR and dL from the partial sums of the blocks, added in the order of the blocks: by task, then by chunk of B.
#pragma once

#include "block.cuh"

namespace kfo::cuda {

template <typename T>
struct Sum {
  Table table;
  const T* scratch;
  Output<T> dR, dL;
};

// One thread computes one element of one row of dR or dL. A shared factor's single row sums over all tasks.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Sum<T> args) {
  const Entry& entry = find_entry(args.table, &Entry::first_sum_block);
  const Problem& problem = entry.problem;
  const int64_t blocks_per_row = (entry.partials_size + blockDim.x - 1) / blockDim.x;
  const int64_t block = blockIdx.x - entry.first_sum_block, row = block / blocks_per_row;
  const int64_t element = block % blocks_per_row * blockDim.x + threadIdx.x;
  if (element >= entry.partials_size) return;

  const int64_t R_size = args.table.dR_rows ? problem.p * problem.p : 0;
  const bool is_R = element < R_size;
  const int64_t output_rows = is_R ? args.table.dR_rows : args.table.dL_rows;
  if (row >= output_rows) return;

  const bool shared = output_rows == 1;
  const int64_t first = (shared ? 0 : row) * entry.chunks, count = (shared ? args.table.tasks : 1) * entry.chunks;
  T sum = 0;
  for (int64_t i = first; i < first + count; ++i)
    sum += args.scratch[entry.partials + i * entry.partials_size + element];

  if (is_R)
    args.dR.data[row * args.dR.stride + problem.R + element] = sum;
  else
    args.dL.data[row * args.dL.stride + problem.L + element - R_size] = sum;
}

}  // namespace kfo::cuda
