// The work of one thread block: the entry of the table that it is for, rows of that problem and task, their operands in
// shared memory, and what is made of them.
#pragma once

#include <cstdint>

#include "products.cuh"
#include "staging.cuh"
#include "table.h"

namespace kfo::cuda {

// The entry that this block works on, given the field that numbers the blocks of the launch.
__device__ __forceinline__ const Entry& find_entry(const Table& table, int32_t Entry::* first_block) {
  int low = 0, high = table.count;  // entries[low] starts at or before this block, entries[high] after it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.entries[middle].*first_block <= static_cast<int32_t>(blockIdx.x) ? low : high) = middle;
  }
  return table.entries[low];
}

// A matrix per row of the block (n, p, q), or a factor, in shared memory: an offset; -1 is an absent operand.
using Place = int;
constexpr Place kAbsent = -1;

template <typename T>
class Block {
 public:
  __device__ __forceinline__ explicit Block(const Arguments<T, Table>& args)
      : table_(args.table),
        data_(args.data),
        entry_(find_entry(table_, &Entry::first_block)),
        p_(entry_.p),
        q_(entry_.q) {
    block_ = static_cast<int>(blockIdx.x) - entry_.first_block;
    task_ = block_ / entry_.chunks;
    const int64_t chunk = block_ % entry_.chunks, begin = entry_.B * chunk / entry_.chunks;
    n_ = static_cast<int>(entry_.B * (chunk + 1) / entry_.chunks - begin);
    first_ = entry_.G + begin * p_ * q_;
  }

  // Copies of operands, complete at the first job of `compute`.
  __device__ __forceinline__ Place stage_R(Source source) { return staged(source, entry_.R, p_, p_); }
  __device__ __forceinline__ Place stage_L(Source source) { return staged(source, entry_.L, q_, q_); }
  __device__ __forceinline__ Place stage_rows(Source source) { return staged(source, first_, n_ * p_, q_); }
  // Room for one p x q result for each row.
  __device__ __forceinline__ Place room() { return take(n_ * p_, q_); }

  // X F and X F^T for a right factor, F X and F^T X for a left one, for each matrix of X (n, p, q).
  __device__ __forceinline__ Term times(Place X, Place F) const { return by_right(X, F, 1, pitch_of(q_)); }
  __device__ __forceinline__ Term times_transposed(Place X, Place F) const { return by_right(X, F, pitch_of(q_), 1); }
  __device__ __forceinline__ Term of(Place F, Place X) const { return by_left(F, X, pitch_of(p_), 1); }
  __device__ __forceinline__ Term of_transposed(Place F, Place X) const { return by_left(F, X, 1, pitch_of(p_)); }
  // sum_b X_b Y_b^T, (p, p), and sum_b X_b^T Y_b, (q, q).
  __device__ __forceinline__ Term sum_outer(Place X, Place Y) const {
    const int row = pitch_of(q_), matrix = p_ * row;
    return term({X, row, 0, 0, 1, matrix}, {Y, row, 0, 0, 1, matrix}, q_, n_);
  }
  __device__ __forceinline__ Term sum_inner(Place X, Place Y) const {
    const int row = pitch_of(q_);
    return term({X, 1, 0, 0, row, 0}, {Y, 1, 0, 0, row, 0}, n_ * p_, 1);
  }

  // A product to its place in shared memory: right and left ones are (n, p, q).
  __device__ __forceinline__ Job<T> to_right(Place to, Term X, Term Y = {}) const {
    return {{n_ * p_, q_, X, Y}, {to, 1, 0, 0, 0, 0}, pitch_of(q_), nullptr};
  }
  __device__ __forceinline__ Job<T> to_left(Place to, Term X, Term Y = {}) const {
    return {{p_, n_ * q_, X, Y}, columns_of(to), pitch_of(q_), nullptr};
  }
  // The block's share of dR (p, p) or dL (q, q): to the output itself where there is no other, else to the scratch
  // memory.
  __device__ __forceinline__ Job<T> to_dR(Term X) const {
    T* to = table_.is_complete(entry_, table_.dR_rows) ? row(kdR) + entry_.R : partials();
    return {{p_, p_, X, {}}, {}, 0, to};
  }
  __device__ __forceinline__ Job<T> to_dL(Term X, Term Y = {}) const {
    T* to = table_.is_complete(entry_, table_.dL_rows) ? row(kdL) + entry_.L
                                                       : partials() + (table_.dR_rows ? int64_t{p_} * p_ : 0);
    return {{q_, q_, X, Y}, {}, 0, to};
  }

  // Waits for the copies, then does make(job) for job < count, in order. Before the jobs of `barriers` (a bit each) all
  // before is complete. One loop, so that there is one copy of the products' code, which the instruction cache holds.
  template <typename Make>
  __device__ __forceinline__ void compute(int count, unsigned barriers, Make make) const {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll 1
    for (int job = 0; job < count; ++job) {
      if (barriers >> job & 1) __syncthreads();
      // From both ends in turn: a job that leaves threads idle leaves them to the next one.
      const int thread = static_cast<int>(threadIdx.x);
      write_product(shared_array<T>(), make(job), job & 1 ? kThreads - 1 - thread : thread);
    }
    __syncthreads();
  }

  // (n, p, q) to the block's rows of an output.
  __device__ __forceinline__ void copy_out(Target target, Place from) const {
    unstage(row(target) + first_, shared_array<T>() + from, n_ * p_, q_);
  }

  // Adds the bias, one (p, q) term, to each matrix.
  __device__ __forceinline__ void add_bias(Place to) const {
    const T* from = row(kBias) + entry_.bias;
    T* shared = shared_array<T>() + to;
    for (int e = threadIdx.x; e < n_ * p_ * q_; e += kThreads) shared[shared_index(e, q_)] += from[e % (p_ * q_)];
  }

 private:
  const Table& table_;
  const Data<T>& data_;
  const Entry& entry_;
  int p_, q_, n_, block_;
  int64_t task_, first_;
  int free_ = 0;

  __device__ __forceinline__ Place take(int rows, int cols) {
    const Place place = free_;
    free_ += padded_size(rows, cols, sizeof(T));
    return place;
  }

  __device__ __forceinline__ Place staged(Source source, int64_t offset, int rows, int cols) {
    if (!data_.has(source)) return kAbsent;
    const T* from = row(source) + offset;
    const Place place = take(rows, cols) + misalignment(from);
    stage(shared_array<T>() + place, from, rows, cols);
    return place;
  }

  __device__ __forceinline__ Term term(const Side& A, const Side& B, int depth, int repeats) const {
    return {A, B, A.data == kAbsent || B.data == kAbsent ? 0 : depth, repeats};
  }
  __device__ __forceinline__ Term by_right(Place X, Place F, int stride, int step) const {
    return term({X, pitch_of(q_), 0, 0, 1, 0}, {F, stride, 0, 0, step, 0}, q_, 1);
  }
  __device__ __forceinline__ Term by_left(Place F, Place X, int stride, int step) const {
    return term({F, stride, 0, 0, step, 0}, columns_of(X), p_, 1);
  }
  // (n, p, q) as p rows of n * q columns.
  __device__ __forceinline__ Side columns_of(Place X) const { return {X, 1, q_, p_ * pitch_of(q_), pitch_of(q_), 0}; }

  // The packed row of the block's task.
  __device__ __forceinline__ const T* row(Source source) const {
    return data_[source].data + task_ * data_[source].stride;
  }
  __device__ __forceinline__ T* row(Target target) const { return data_[target].data + task_ * data_[target].stride; }

  __device__ __forceinline__ T* partials() const {
    return data_[kScratch].data + entry_.partials + block_ * table_.partials_size(entry_);
  }
};

}  // namespace kfo::cuda
