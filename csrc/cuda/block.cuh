// The work of one thread block: which rows of which problem and task, and where it keeps what it computes.
#pragma once

#include <cstdint>

#include "products.cuh"
#include "table.h"

namespace kfo::cuda {

// A packed input. Row stride 0: one row for all tasks. Null data: an absent operand.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
};

// A packed output. Null data: not needed.
template <typename T>
struct Output {
  T* data;
  int64_t stride;
};

// The entry that this block works on, given the field that numbers the blocks of the launch.
__device__ inline const Entry& find_entry(const Table& table, int64_t Entry::* first_block) {
  int64_t i = 0;
  while (i + 1 < table.count && blockIdx.x >= table.entries[i + 1].*first_block) ++i;
  return table.entries[i];
}

template <typename T>
class Block {
 public:
  __device__ Block(const Table& table, T* scratch, T* shared)
      : entry_(find_entry(table, &Entry::first_block)), free_(shared) {
    const int64_t block = blockIdx.x - entry_.first_block, chunk = block % entry_.chunks;
    task_ = block / entry_.chunks;
    begin_ = entry_.problem.B * chunk / entry_.chunks;
    rows_ = entry_.problem.B * (chunk + 1) / entry_.chunks - begin_;
    spill_ = entry_.intermediates < 0 ? nullptr : scratch + entry_.intermediates + block * entry_.intermediates_size;
    partials_ = scratch + entry_.partials + block * entry_.partials_size;
  }

  __device__ const Problem& problem() const { return entry_.problem; }
  __device__ int64_t rows() const { return rows_; }

  // The partial dR and dL of this block, one after the other.
  __device__ T* partials() const { return partials_; }

  // The block's rows of an operand (B, p, q).
  __device__ Matrices<T> matrices(const Operand<T>& operand) const {
    if (!operand.data) return {};
    return many_matrices(operand.data + task_ * operand.stride + first_element(), problem().p, problem().q);
  }

  // The block's rows of an output (B, p, q).
  __device__ T* rows_of(const Output<T>& output) const { return output.data + task_ * output.stride + first_element(); }

  // What lies at `offset` of the operand's packed row, or null.
  __device__ const T* at(const Operand<T>& operand, int64_t offset) const {
    return operand.data ? operand.data + task_ * operand.stride + offset : nullptr;
  }

  // The factor R (p, p) or L (q, q), copied to shared memory where it fits: complete after the next barrier.
  __device__ Matrices<T> R(const Operand<T>& operand) { return factor(at(operand, problem().R), problem().p); }
  __device__ Matrices<T> L(const Operand<T>& operand) { return factor(at(operand, problem().L), problem().q); }

  // Room for one p x q result for each row of the block. Ask after the factors: they come first in shared memory.
  __device__ T* intermediate() {
    const int64_t size = rows_ * problem().p * problem().q;
    return entry_.intermediates < 0 ? take(free_, size) : take(spill_, size);
  }

  __device__ Matrices<T> view(const T* intermediate) const {
    return many_matrices(intermediate, problem().p, problem().q);
  }

 private:
  const Entry& entry_;
  int64_t task_, begin_, rows_;
  T* free_;   // shared memory not yet taken
  T* spill_;  // ... and scratch memory
  T* partials_;

  __device__ int64_t first_element() const { return problem().G + begin_ * problem().p * problem().q; }

  static __device__ T* take(T*& pool, int64_t size) {
    T* room = pool;
    pool += size;
    return room;
  }

  __device__ Matrices<T> factor(const T* data, int64_t size) {
    if (!data || !entry_.staged) return one_matrix(data, size);
    T* copy = take(free_, size * size);
    for (int64_t e = threadIdx.x; e < size * size; e += blockDim.x) copy[e] = data[e];
    return one_matrix<T>(copy, size);
  }
};

}  // namespace kfo::cuda
