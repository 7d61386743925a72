// dR and dL from the partial sums of the blocks, added in a fixed order: slice by slice, then the slices.
#pragma once

#include "staging.cuh"
#include "work.cuh"

namespace kfo::cuda {

// One element of one row of dR or dL. A shared factor's single row sums over all tasks, then chunks of B.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ Arguments<T, Table> args) {
  const Table& table = args.table;
  const int index = find_entry(table.first_sum_block);
  const Entry& entry = table.entries[index];
  const int64_t size = table.partials_size(entry), R_size = table.dR_rows ? int64_t{entry.p} * entry.p : 0;
  const int block = static_cast<int>(blockIdx.x) - table.first_sum_block[index];
  const int64_t row = entry.by_sum_blocks.quotient(block);
  const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  const int64_t element = (block - row * entry.by_sum_blocks.by) * kSumColumns + column;

  const bool is_R = element < R_size;
  const int64_t output_rows = is_R ? table.dR_rows : table.dL_rows;
  const bool summed = element < size && row < output_rows && !table.is_complete(entry, output_rows);
  double sum = 0;  // so that its error does not grow with the number of tasks
  if (summed) {
    // A factor of one row, of one task or shared by all, sums over everything.
    const int64_t count = (output_rows == 1 ? table.tasks : 1) * entry.chunks();
    const T* partials = args.data[kScratch].data + entry.partials + row * entry.chunks() * size + element;
#pragma unroll 4
    for (int64_t i = slice; i < count; i += kSumSlices) sum += partials[i * size];
  }
  double* slices = shared_array<double>();
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (!summed || slice != 0) return;
  for (int s = 1; s < kSumSlices; ++s) sum += slices[s * kSumColumns + column];
  const PackedRows<T>& output = args.data[is_R ? kdR : kdL];
  output.data[row * output.stride + (is_R ? entry.R + element : entry.L + element - R_size)] = static_cast<T>(sum);
}

}  // namespace kfo::cuda
