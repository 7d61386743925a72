// Sums of matrix products in shared memory, spread over the threads of a block. A thread computes tiles of rows x
// columns in registers; every sum runs in one fixed order.
#pragma once

#include "../integers.h"
#include "table.h"

namespace kfo::cuda {

// One side of a product, X(i, k). All numbers are offsets (in elements) into the block's shared memory, which makes
// them 32-bit and keeps every access a shared one.
struct Side {
  int data;
  int stride;               // from one i to the next, within a group
  int group, group_stride;  // i runs in groups of `group`, group_stride apart; 0 is one group
  int step, repeat_step;    // from one k to the next, and from one repeat of all k to the next

  __device__ int offset(int i) const {
    return data + (group ? i / group * group_stride + i % group * stride : i * stride);
  }
};

// sum over repeats and k of A(i, k) B(j, k). Absent terms have depth 0.
struct Term {
  Side A, B;
  int depth, repeats;
};

// X + Y, (rows, cols).
struct Product {
  int rows, cols;
  Term X, Y;
};

template <int kRows, int kCols, typename T>
__device__ __forceinline__ void accumulate(T (&sum)[kRows][kCols], const T* shared, const Term& term,
                                           const int (&i)[kRows], const int (&j)[kCols]) {
  if (term.depth == 0) return;
  int a[kRows], b[kCols];
#pragma unroll
  for (int u = 0; u < kRows; ++u) a[u] = term.A.offset(i[u]);
#pragma unroll
  for (int v = 0; v < kCols; ++v) b[v] = term.B.offset(j[v]);
  for (int repeat = 0; repeat < term.repeats; ++repeat) {
    int at_a = repeat * term.A.repeat_step, at_b = repeat * term.B.repeat_step;
#pragma unroll 4
    for (int k = 0; k < term.depth; ++k, at_a += term.A.step, at_b += term.B.step) {
      T x[kRows], y[kCols];
#pragma unroll
      for (int u = 0; u < kRows; ++u) x[u] = shared[a[u] + at_a];
#pragma unroll
      for (int v = 0; v < kCols; ++v) y[v] = shared[b[v] + at_b];
#pragma unroll
      for (int u = 0; u < kRows; ++u)
#pragma unroll
        for (int v = 0; v < kCols; ++v) sum[u][v] = fma(x[u], y[v], sum[u][v]);
    }
  }
}

// Where a product goes: to shared memory, (i, j) at columns.offset(j) + i * row, or packed to global memory.
template <typename T>
struct Job {
  Product product;  // no rows: nothing to do
  Side columns;
  int row;
  T* global;

  __device__ __forceinline__ void write(T* shared, int i, int j, T value) const {
    if (global)
      global[i * product.cols + j] = value;
    else
      shared[columns.offset(j) + i * row] = value;
  }
};

// Tiles of kRows x kCols, interleaved: neighbouring threads have neighbouring columns, hence different banks.
template <int kRows, int kCols, typename T>
__device__ __forceinline__ void write_tiles(T* shared, const Job<T>& job, int thread) {
  const Product& product = job.product;
  const int row_tiles = ceil_div(product.rows, kRows), col_tiles = ceil_div(product.cols, kCols);
  for (int tile = thread; tile < row_tiles * col_tiles; tile += kThreads) {
    const int i0 = tile / col_tiles, j0 = tile % col_tiles;
    int i[kRows], j[kCols];
    // Past the edge: the last row or column again, computed and not written.
#pragma unroll
    for (int u = 0; u < kRows; ++u) i[u] = min(i0 + u * row_tiles, product.rows - 1);
#pragma unroll
    for (int v = 0; v < kCols; ++v) j[v] = min(j0 + v * col_tiles, product.cols - 1);
    T sum[kRows][kCols] = {};
    accumulate(sum, shared, product.X, i, j);
    accumulate(sum, shared, product.Y, i, j);
#pragma unroll
    for (int u = 0; u < kRows; ++u)
#pragma unroll
      for (int v = 0; v < kCols; ++v)
        if (i0 + u * row_tiles < product.rows && j0 + v * col_tiles < product.cols)
          job.write(shared, i[u], j[v], sum[u][v]);
  }
}

// `thread`: a number of its own for each thread. By the largest tiles that still give half of the threads one: a large
// tile reads shared memory less often for each multiply-add.
template <typename T>
__device__ __forceinline__ void write_product(T* shared, const Job<T>& job, int thread) {
  const auto tiles = [&](int side) { return ceil_div(job.product.rows, side) * ceil_div(job.product.cols, side); };
  if (tiles(4) >= kThreads / 2)
    write_tiles<4, 4>(shared, job, thread);
  else if (tiles(2) >= kThreads / 2)
    write_tiles<2, 2>(shared, job, thread);
  else
    write_tiles<1, 1>(shared, job, thread);
}

}  // namespace kfo::cuda
