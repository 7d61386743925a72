// The work of one thread block as products of all its threads: operands in shared memory, and what is made of them.
#pragma once

#include <cstdint>

#include "products.cuh"
#include "staging.cuh"
#include "work.cuh"

namespace kfo::cuda {

// A matrix per row of the block (n, p, q), or a factor, in shared memory: an offset; -1 is an absent operand.
using Place = int;
constexpr Place kAbsent = -1;

template <typename T>
class Block {
 public:
  __device__ __forceinline__ explicit Block(const Work<T>& work)
      : work_(work), entry_(work.entry), p_(work.p), q_(work.q), n_(work.n) {}

  // Copies of operands, complete at the first job of `compute`.
  __device__ __forceinline__ Place stage_R(Source source) { return staged(source, entry_.R, p_, p_, entry_.by_p); }
  __device__ __forceinline__ Place stage_L(Source source) { return staged(source, entry_.L, q_, q_, entry_.by_q); }
  __device__ __forceinline__ Place stage_rows(Source source) {
    return staged(source, work_.first, n_ * p_, q_, entry_.by_q);
  }
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
    return term({X, row, 0, 1, matrix}, {Y, row, 0, 1, matrix}, q_, n_);
  }
  __device__ __forceinline__ Term sum_inner(Place X, Place Y) const {
    const int row = pitch_of(q_);
    return term({X, 1, 0, row, 0}, {Y, 1, 0, row, 0}, n_ * p_, 1);
  }

  // A product to its place in shared memory, (n, p, q). A left one is computed as its transpose, for each matrix.
  __device__ __forceinline__ Job<T> to_right(Place to, Term X, Term Y = {}) const {
    return {kRight, n_ * p_, q_, X, Y, {to, pitch_of(q_), 0, 1, 0}, nullptr};
  }
  __device__ __forceinline__ Job<T> to_left(Place to, Term X, Term Y = {}) const {
    return {kLeft, n_ * q_, p_, X, Y, columns_of(to), nullptr};
  }
  __device__ __forceinline__ Job<T> to_dR(Term X) const { return {kSumR, p_, p_, X, {}, {}, work_.share_of_dR()}; }
  __device__ __forceinline__ Job<T> to_dL(Term X, Term Y = {}) const {
    return {kSumL, q_, q_, X, Y, {}, work_.share_of_dL()};
  }

  // Waits for the copies, then does make(job) for job < count, in order. Before the jobs of `barriers` (a bit each) all
  // before is complete. One loop, so that there is one copy of the products' code, which the instruction cache holds;
  // jobs are made while the copies are on their way, and kept in shared memory: registers would not hold them.
  template <typename Make>
  __device__ __forceinline__ void compute(int count, unsigned barriers, Make make) const {
    __pipeline_commit();
    Job<T>* jobs = reinterpret_cast<Job<T>*>(shared_array<T>());
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < count) jobs[thread] = make(thread);
    __pipeline_wait_prior(0);
    __syncthreads();
#pragma unroll 1
    for (int job = 0; job < count; ++job) {
      if (barriers >> job & 1) __syncthreads();
      // From both ends in turn: a job that leaves threads idle leaves them to the next one.
      write_product(shared_array<T>(), jobs[job], job & 1 ? kThreads - 1 - thread : thread, entry_);
    }
    __syncthreads();
  }

  // (n, p, q) to the block's rows of an output.
  __device__ __forceinline__ void copy_out(Target target, Place from) const {
    unstage(work_.row(target) + work_.first, shared_array<T>() + from, n_ * p_, q_, entry_.by_q);
  }

  // Adds the bias, one (p, q) term, to each matrix.
  __device__ __forceinline__ void add_bias(Place to) const {
    const T* from = work_.row(kBias) + entry_.bias;
    T* shared = shared_array<T>() + to;
    for (int e = threadIdx.x; e < n_ * p_ * q_; e += kThreads) {
      const int matrix = entry_.by_p.quotient(entry_.by_q.quotient(e));
      shared[shared_index(e, q_, entry_.by_q)] += from[e - matrix * p_ * q_];
    }
  }

 private:
  const Work<T>& work_;
  const Entry& entry_;
  int p_, q_, n_;
  int free_ = kJobBytes / sizeof(T);

  __device__ __forceinline__ Place take(int rows, int cols) {
    const Place place = free_;
    free_ += padded_size(rows, cols, sizeof(T));
    return place;
  }

  __device__ __forceinline__ Place staged(Source source, int64_t offset, int rows, int cols, SmallDivisor by_cols) {
    if (!work_.data.has(source)) return kAbsent;
    const T* from = work_.row(source) + offset;
    const Place place = take(rows, cols) + misalignment(from);
    stage(shared_array<T>() + place, from, rows, cols, by_cols);
    return place;
  }

  __device__ __forceinline__ Term term(const Side& A, const Side& B, int depth, int repeats) const {
    return {A, B, A.data == kAbsent || B.data == kAbsent ? 0 : depth, repeats};
  }
  __device__ __forceinline__ Term by_right(Place X, Place F, int stride, int step) const {
    return term({X, pitch_of(q_), 0, 1, 0}, {F, stride, 0, step, 0}, q_, 1);
  }
  __device__ __forceinline__ Term by_left(Place F, Place X, int stride, int step) const {
    return term(columns_of(X), {F, stride, 0, step, 0}, p_, 1);
  }
  // (n, p, q) as n * q rows, its columns, of p.
  __device__ __forceinline__ Side columns_of(Place X) const { return {X, 1, p_ * pitch_of(q_), pitch_of(q_), 0}; }
};

}  // namespace kfo::cuda
