// The two layouts the orders are computed in. Each block holds some matrices X_b of one problem and offers the same
// operations on them: load, clear, left (F X), right (X F), left_gradient (sum X Y^T), right_gradient (sum X^T Y) and
// store.
#pragma once

#include "packed_gemm.h"
#include "products.h"
#include "transform_kernels.h"
#include "transpose.h"

namespace {

using kfo::cpu::Job;
using kfo::cpu::Matrices;

template <class T>
T* row_of(const Matrices<T>& matrices, const Job<std::remove_const_t<T>>& job, int64_t row) {
  return matrices.data + row / job.B * matrices.task_stride + row % job.B * job.p * job.q;
}

// Many small matrices at a time, [i][j][b]: b is innermost, so that every product is a scalar times a vector of b.
template <class T>
class LaneBlock {
 public:
  using Matrix = T*;

  LaneBlock(const Job<T>& job, int64_t first, int64_t rows, T* memory)
      : job_(job), first_(first), rows_(rows), width_(round_up(rows, kLanes<T>)), free_(memory) {}

  static int64_t matrix_elements(const Job<T>& job, int64_t rows) { return job.p * job.q * round_up(rows, kLanes<T>); }

  Matrix matrix() {
    Matrix out = free_;
    free_ += job_.p * job_.q * width_;
    return out;
  }
  Matrix matrix_for(const Matrices<T>&) { return matrix(); }

  Matrix load(const Matrices<const T>& source) {
    Matrix out = matrix();
    gather(rows_, job_.p * job_.q, [&](int64_t r) { return row_of(source, job_, first_ + r); }, out, width_);
    return out;
  }

  void store(Matrix X, const Matrices<T>& out, const Matrices<const T>& bias) {
    const auto bias_at = [&](int64_t r) {
      return bias.data ? bias.data + (first_ + r) / job_.B * bias.task_stride : nullptr;
    };
    scatter(rows_, job_.p * job_.q, X, width_, [&](int64_t r) { return row_of(out, job_, first_ + r); }, bias_at);
  }

  void left(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    const int64_t row = job_.q * width_;
    product<T>(job_.prefetch, job_.p, row, job_.p, F, {X, row}, {out, row}, add);
  }

  void right(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    const int64_t step = job_.q * width_;
    product<T>(job_.prefetch, job_.q, width_, job_.q, {F.data, F.column, F.row}, {X, width_}, {out, width_}, add,
               {job_.p, 0, step, step});
  }

  // Sums over the rows that exist only: what lies in the lanes that complete a vector never reaches a result.
  void left_gradient(Matrix X, Matrix Y, T* out, bool add) {
    const int64_t row = job_.q * width_;
    dots<T>(job_.prefetch, job_.p, job_.p, {X, row}, {Y, row}, {out, job_.p}, {job_.q, rows_, width_}, add);
  }

  void right_gradient(Matrix X, Matrix Y, T* out, bool add) {
    dots<T>(job_.prefetch, job_.q, job_.q, {X, width_}, {Y, width_}, {out, job_.q}, {job_.p, rows_, job_.q * width_},
            add);
  }

  void clear(Matrix X) { __builtin_memset(X, 0, static_cast<size_t>(job_.p * job_.q * width_) * sizeof(T)); }

 private:
  const Job<T>& job_;
  const int64_t first_, rows_, width_;
  T* free_;
};

// One matrix at a time, row-major and mostly in place. With `transposed`, the job is that of the transposed problem
// Y^T = L^T G^T R (its p, q, R and L exchanged) and matrices are transposed on their way in and out.
template <class T>
class RowBlock {
 public:
  using Matrix = Rows<T>;

  RowBlock(const Job<T>& job, int64_t first, bool transposed, T* memory)
      : job_(job),
        first_(first),
        transposed_(transposed && job.p > 1),
        width_(width(job)),
        copies_(memory),
        free_(memory + (needs_copies(job) ? packed_gemm_scratch<T>() : 0)) {}

  // Elements of scratch memory, for so many matrices.
  static int64_t memory(const Job<T>& job, int matrices) {
    return matrices * matrix_elements(job) + (needs_copies(job) ? packed_gemm_scratch<T>() : 0);
  }

  static int64_t width(const Job<T>& job) { return round_up(job.q, kLanes<T>); }
  static int64_t matrix_elements(const Job<T>& job) { return job.p * width(job); }

  Matrix matrix() {
    Matrix out{free_, width_};
    free_ += job_.p * width_;
    return out;
  }
  Matrix matrix_for(const Matrices<T>& out) {
    return transposed_ ? matrix() : Matrix{row_of(out, job_, first_), job_.q};
  }

  Matrix load(const Matrices<const T>& source) {
    const T* data = row_of(source, job_, first_);
    // Operands are never written: only matrix() and matrix_for() hand out results.
    if (!transposed_) return {const_cast<T*>(data), job_.q};
    Matrix out = matrix();
    gather(job_.q, job_.p, [&](int64_t r) { return data + r * job_.p; }, out.data, out.row);
    return out;
  }

  void store(Matrix X, const Matrices<T>& out, const Matrices<const T>& bias) {
    T* data = row_of(out, job_, first_);
    const T* offset = bias.data ? bias.data + first_ / job_.B * bias.task_stride : nullptr;
    if (transposed_) {
      scatter(
          job_.q, job_.p, X.data, X.row, [&](int64_t r) { return data + r * job_.p; },
          [&](int64_t r) { return offset ? offset + r * job_.p : nullptr; });
    } else if (offset) {
      for (int64_t i = 0; i < job_.p * job_.q; ++i) data[i] += offset[i];
    }
  }

  void left(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    multiply(job_.p, job_.q, job_.p, F, {X.data, 1, X.row}, out, add);
  }

  void right(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    multiply(job_.p, job_.q, job_.q, {X.data, X.row, 1}, {F.data, F.column, F.row}, out, add);
  }

  void left_gradient(Matrix X, Matrix Y, T* out, bool add) {
    multiply(job_.p, job_.p, job_.q, {X.data, X.row, 1}, {Y.data, Y.row, 1}, {out, job_.p}, add);
  }

  void right_gradient(Matrix X, Matrix Y, T* out, bool add) {
    multiply(job_.q, job_.q, job_.p, {X.data, 1, X.row}, {Y.data, 1, Y.row}, {out, job_.q}, add);
  }

  void clear(Matrix X) {
    for (int64_t i = 0; i < job_.p; ++i)
      __builtin_memset(X.data + i * X.row, 0, static_cast<size_t>(job_.q) * sizeof(T));
  }

 private:
  // C (M, N) = A (M, K) X^T (K, N), or C += A X^T; the rows or the columns of X are contiguous.
  void multiply(int64_t M, int64_t N, int64_t K, Factor<T> A, Factor<T> X, Matrix C, bool add) {
    if (packing_pays(M, N, K) || (X.row != 1 && are_dots_slow(M, N, K)))
      packed_gemm<T>(job_.prefetch, M, N, K, A, X, C, add, copies_);
    else if (X.row == 1)
      product<T>(job_.prefetch, M, N, K, A, {X.data, X.column}, C, add);
    else
      dots<T>(job_.prefetch, M, N, {A.data, A.row}, {X.data, X.row}, C, {1, K, 0}, add);
  }

  const Job<T>& job_;
  // Whether some product of the job needs copies of its operands.
  static bool needs_copies(const Job<T>& job) {
    const int64_t most = job.p > job.q ? job.p : job.q, least = job.p > job.q ? job.q : job.p;
    return packing_pays(job.p, job.q, most) || are_dots_slow(most, most, least);
  }

  const int64_t first_;
  const bool transposed_;
  const int64_t width_;
  T* const copies_;
  T* free_;
};

}  // namespace
