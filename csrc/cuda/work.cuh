// The share of one thread block: the entry of the table that it is for, its task, and its matrices.
#pragma once

#include <cstdint>

#include "table.h"

namespace kfo::cuda {

// The entry that this block works on: the last one whose first block is not behind it. All comparisons at once, as a
// search would wait for one after the other.
__device__ __forceinline__ int find_entry(const int32_t (&first_block)[kTableProblems]) {
  int index = 0;
#pragma unroll
  for (int i = 1; i < kTableProblems; ++i) index += first_block[i] <= static_cast<int32_t>(blockIdx.x);
  return index;
}

// Blocks of an order's kernel whose registers fit on one multiprocessor. A warp that computes a matrix of float32 keeps
// rows of it in registers; for 8.0 the compiler spills float64 below 255.
template <typename T>
constexpr int resident_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return sizeof(T) == 4 ? 3 : 2;
#else
  return sizeof(T) == 4 ? 3 : 4;
#endif
}

template <typename T>
struct Work {
  const Table& table;
  const Data<T>& data;
  const Entry& entry;
  int p, q, block, task;
  int n;          // matrices
  int64_t first;  // element of a packed row of them

  __device__ __forceinline__ explicit Work(const Arguments<T, Table>& args)
      : Work(args, find_entry(args.table.first_block)) {}

  // The packed row of the block's task.
  __device__ __forceinline__ const T* row(Source source) const {
    return data[source].data + int64_t{task} * data[source].stride;
  }
  __device__ __forceinline__ T* row(Target target) const {
    return data[target].data + int64_t{task} * data[target].stride;
  }

  // Where the block's share of dR (p, p) and dL (q, q) goes: to the output itself where there is no other, else to the
  // scratch memory.
  __device__ __forceinline__ T* share_of_dR() const {
    return table.is_complete(entry, table.dR_rows) ? row(kdR) + entry.R : partials();
  }
  __device__ __forceinline__ T* share_of_dL() const {
    return table.is_complete(entry, table.dL_rows) ? row(kdL) + entry.L
                                                   : partials() + (table.dR_rows ? int64_t{p} * p : 0);
  }

 private:
  __device__ __forceinline__ Work(const Arguments<T, Table>& args, int index)
      : table(args.table),
        data(args.data),
        entry(table.entries[index]),
        p(entry.p),
        q(entry.q),
        block(static_cast<int>(blockIdx.x) - table.first_block[index]),
        task(entry.by_chunks.quotient(block)) {
    const int chunk = block - task * entry.chunks();
    n = entry.rows + (chunk < entry.longer);
    first = entry.G + (int64_t{chunk} * entry.rows + min(chunk, entry.longer)) * (p * q);
  }

  __device__ __forceinline__ T* partials() const {
    return data[kScratch].data + entry.partials + int64_t{block} * table.partials_size(entry);
  }
};

}  // namespace kfo::cuda
