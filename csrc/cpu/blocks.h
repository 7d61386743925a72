// The two layouts the orders are computed in. Each block holds some matrices X_b of one problem and offers the same
// operations on them: load, left (F X), right (X F), left_gradient (sum X Y^T), right_gradient (sum X^T Y) and store.
#pragma once

#include "products.h"
#include "transform_kernels.h"

namespace {

using kfo::cpu::Job;
using kfo::cpu::Matrices;

template <class T>
T* row_of(const Matrices<T>& matrices, const Job<std::remove_const_t<T>>& job, int64_t row) {
  return matrices.data + row / job.B * matrices.task_stride + row % job.B * job.p * job.q;
}

// One tile of at most kLanes<T> rows and columns. Loops over its vectors have constant bounds, which keeps them in
// registers.
template <class T>
void gather_tile(const T* const* row, int rows, int64_t column, int columns, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  Vec<T> v[W] = {};
  if (rows == W && columns == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load(row[i] + column);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) v[i] = load_first(row[i] + column, columns);
  }
  transpose<T>(v);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (i < columns) store(out + i * width, v[i]);
}

template <class T>
void scatter_tile(const T* in, int64_t width, T* const* row, const T* const* bias, int rows, int64_t column,
                  int columns) {
  constexpr int W = kLanes<T>;
  Vec<T> v[W] = {};
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (i < columns) v[i] = load(in + i * width);
  transpose<T>(v);
  if (bias[0]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) v[i] += load_first(bias[i] + column, columns);
  }
  if (rows == W && columns == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(row[i] + column, v[i]);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (i < rows) store_first(row[i] + column, v[i], columns);
  }
}

// out[c * width + r] = row_at(r)[c], with zeros for the r that complete the last vector.
template <class T, class RowAt>
void gather(int64_t rows, int64_t columns, RowAt row_at, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int n = static_cast<int>(smaller(rows - r, W));
    const T* row[W];
    for (int i = 0; i < n; ++i) row[i] = row_at(r + i);
    for (int64_t c = 0; c < columns; c += W)
      gather_tile(row, n, c, static_cast<int>(smaller(columns - c, W)), out + c * width + r, width);
  }
}

// row_at(r)[c] = in[c * width + r] + bias_at(r)[c], without the bias where that is null.
template <class T, class RowAt, class BiasAt>
void scatter(int64_t rows, int64_t columns, const T* in, int64_t width, RowAt row_at, BiasAt bias_at) {
  constexpr int W = kLanes<T>;
  for (int64_t r = 0; r < rows; r += W) {
    const int n = static_cast<int>(smaller(rows - r, W));
    T* row[W];
    const T* bias[W];
    for (int i = 0; i < n; ++i) row[i] = row_at(r + i), bias[i] = bias_at(r + i);
    for (int64_t c = 0; c < columns; c += W)
      scatter_tile(in + c * width + r, width, row, bias, n, c, static_cast<int>(smaller(columns - c, W)));
  }
}

// Many small matrices at a time, [i][j][b]: b is innermost, so that every product is a scalar times a vector of b.
template <class T>
class LaneBlock {
 public:
  using Matrix = T*;

  LaneBlock(const Job<T>& job, int64_t first, int64_t rows, T* memory)
      : job_(job), first_(first), rows_(rows), width_(ceil_div(rows, kLanes<T>) * kLanes<T>), free_(memory) {}

  static int64_t matrix_elements(const Job<T>& job, int64_t rows) {
    return job.p * job.q * ceil_div(rows, kLanes<T>) * kLanes<T>;
  }

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
    product<T>(job_.ahead, job_.p, row, job_.p, F, {X, row}, {out, row}, add);
  }

  void right(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    const int64_t step = job_.q * width_;
    product<T>(job_.ahead, job_.q, width_, job_.q, {F.data, F.column, F.row}, {X, width_}, {out, width_}, add,
               {job_.p, 0, step, step});
  }

  // Sums over the rows that exist only: what lies in the lanes that complete a vector never reaches a result.
  void left_gradient(Matrix X, Matrix Y, T* out, bool add) {
    const int64_t row = job_.q * width_;
    dots<T>(job_.ahead, job_.p, job_.p, {X, row}, {Y, row}, {out, job_.p}, {job_.q, rows_, width_}, add);
  }

  void right_gradient(Matrix X, Matrix Y, T* out, bool add) {
    dots<T>(job_.ahead, job_.q, job_.q, {X, width_}, {Y, width_}, {out, job_.q}, {job_.p, rows_, job_.q * width_}, add);
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
      : job_(job), first_(first), transposed_(transposed && job.p > 1), width_(width(job)), free_(memory) {}

  static int64_t width(const Job<T>& job) { return ceil_div(job.q, kLanes<T>) * kLanes<T>; }
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
    product<T>(job_.ahead, job_.p, job_.q, job_.p, F, {X.data, X.row}, out, add);
  }

  void right(Factor<T> F, Matrix X, Matrix out, bool add = false) {
    if (F.column == 1)
      product<T>(job_.ahead, job_.p, job_.q, job_.q, {X.data, X.row, 1}, {F.data, F.row}, out, add);
    else
      dots<T>(job_.ahead, job_.p, job_.q, {X.data, X.row}, {F.data, F.column}, out, {1, job_.q, 0}, add);
  }

  void left_gradient(Matrix X, Matrix Y, T* out, bool add) {
    dots<T>(job_.ahead, job_.p, job_.p, {X.data, X.row}, {Y.data, Y.row}, {out, job_.p}, {1, job_.q, 0}, add);
  }

  void right_gradient(Matrix X, Matrix Y, T* out, bool add) {
    product<T>(job_.ahead, job_.q, job_.q, job_.p, {X.data, 1, X.row}, {Y.data, Y.row}, {out, job_.q}, add);
  }

  void clear(Matrix X) {
    for (int64_t i = 0; i < job_.p; ++i)
      __builtin_memset(X.data + i * X.row, 0, static_cast<size_t>(job_.q) * sizeof(T));
  }

 private:
  const Job<T>& job_;
  const int64_t first_;
  const bool transposed_;
  const int64_t width_;
  T* free_;
};

}  // namespace
