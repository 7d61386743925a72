// Sums of matrix products in shared memory, spread over the threads of a block. A thread computes tiles of rows x
// columns in registers. Where there are few tiles, neighbouring threads share a tile's sum. Every sum runs in one fixed
// order, which depends on sizes alone.
#pragma once

#include "../integers.h"
#include "table.h"

namespace kfo::cuda {

// One side of a product, X(i, k). All numbers are offsets (in elements) into the block's shared memory, which makes
// them 32-bit and keeps every access a shared one.
struct Side {
  int data;
  int stride, group_stride;  // from one i to the next within a group, and from one group to the next
  int step, repeat_step;     // from one k to the next, and from one repeat of all k to the next
};

// sum over repeats and k of A(i, k) B(j, k). Absent terms have depth 0. B has no groups.
struct Term {
  Side A, B;
  int depth, repeats;
};

// X + Y, (rows, cols), and where it goes: to shared memory, (i, j) at `to` of i + j * step, or packed to global memory.
// The rows of a left product are in groups of q.
template <typename T>
struct Job {
  Kind kind;
  int rows, cols;  // no rows: nothing to do
  Term X, Y;
  Side to;
  T* global;
};

static_assert(kJobs * sizeof(Job<double>) <= kJobBytes && kJobBytes % 16 == 0, "all jobs have a place");

// A row of a product, and its place in its group.
struct RowIndex {
  int i, group, rest;

  __device__ __forceinline__ int offset(const Side& side) const {
    return side.data + group * side.group_stride + rest * side.stride;
  }
};

// Which part of a sum a thread computes: 2^log2 threads of a warp share it, and then add their parts.
struct Share {
  int log2, index;
};

template <int kRows, int kCols, typename T>
__device__ __forceinline__ void accumulate(T (&sum)[kRows][kCols], const T* shared, const Term& term,
                                           const RowIndex (&i)[kRows], const int (&j)[kCols], const Share& share) {
  if (term.depth == 0) return;
  int a[kRows], b[kCols];
#pragma unroll
  for (int u = 0; u < kRows; ++u) a[u] = i[u].offset(term.A);
#pragma unroll
  for (int v = 0; v < kCols; ++v) b[v] = term.B.data + j[v] * term.B.stride;
  // Over repeats first, as far as there are as many.
  const int over_repeats = min(share.log2, 31 - __clz(term.repeats));
  const int repeats = 1 << over_repeats, first = share.index >> over_repeats, every = 1 << (share.log2 - over_repeats);
  const int step_a = every * term.A.step, step_b = every * term.B.step;
  for (int repeat = share.index & (repeats - 1); repeat < term.repeats; repeat += repeats) {
    int at_a = repeat * term.A.repeat_step + first * term.A.step;
    int at_b = repeat * term.B.repeat_step + first * term.B.step;
#pragma unroll 4
    for (int k = first; k < term.depth; k += every, at_a += step_a, at_b += step_b) {
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

// Tiles of kRows x kCols, interleaved: neighbouring threads have neighbouring columns, hence different banks.
template <int kRows, int kCols, typename T>
__device__ __forceinline__ void write_tiles(T* shared, const Job<T>& job, int thread, const Entry& entry, int log2) {
  const int row_tiles = ceil_div(job.rows, kRows), col_tiles = ceil_div(job.cols, kCols);
  const Share share{log2, thread & ((1 << log2) - 1)};
  for (int first = 0; first < row_tiles * col_tiles; first += kThreads >> log2) {
    const int tile = first + (thread >> log2);
    const bool there = tile < row_tiles * col_tiles;
    if (log2 == 0 && !there) break;  // a thread that shares a sum stays: its warp waits for all
    const int i0 = there ? entry.by_col_tiles[job.kind].quotient(tile) : 0, j0 = there ? tile - i0 * col_tiles : 0;
    RowIndex i[kRows];
    int j[kCols];
    // Past the edge: the last row or column again, computed and not written.
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      i[u].i = min(i0 + u * row_tiles, job.rows - 1);
      i[u].group = job.kind == kLeft ? entry.by_q.quotient(i[u].i) : 0;
      i[u].rest = i[u].i - i[u].group * entry.q;
    }
#pragma unroll
    for (int v = 0; v < kCols; ++v) j[v] = min(j0 + v * col_tiles, job.cols - 1);
    T sum[kRows][kCols] = {};
    accumulate(sum, shared, job.X, i, j, share);
    accumulate(sum, shared, job.Y, i, j, share);
#pragma unroll 1
    for (int lanes = 1 << log2 >> 1; lanes; lanes >>= 1)
#pragma unroll
      for (int u = 0; u < kRows; ++u)
#pragma unroll
        for (int v = 0; v < kCols; ++v) sum[u][v] += __shfl_xor_sync(~0u, sum[u][v], lanes);
    if (!there || share.index) continue;
#pragma unroll
    for (int u = 0; u < kRows; ++u)
#pragma unroll
      for (int v = 0; v < kCols; ++v) {
        if (i0 + u * row_tiles >= job.rows || j0 + v * col_tiles >= job.cols) continue;
        if (job.global)
          job.global[i[u].i * job.cols + j[v]] = sum[u][v];
        else
          shared[i[u].offset(job.to) + j[v] * job.to.step] = sum[u][v];
      }
  }
}

// `thread`: a number of its own for each thread, the same warps in any order.
template <typename T>
__device__ __forceinline__ void write_product(T* shared, const Job<T>& job, int thread, const Entry& entry) {
  if (job.rows == 0) return;
  const int side = entry.side[job.kind], log2 = entry.share[job.kind];
  if (side == 4)
    write_tiles<4, 4>(shared, job, thread, entry, 0);
  else if (side == 2)
    write_tiles<2, 2>(shared, job, thread, entry, log2);
  else
    write_tiles<1, 1>(shared, job, thread, entry, log2);
}

}  // namespace kfo::cuda
