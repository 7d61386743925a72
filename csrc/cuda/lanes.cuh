// Matrices of at most 32 rows and kQ columns, each computed by one warp: lane i has row i of it in registers, and reads
// rows that all lanes need from shared memory 16 bytes at a time. No lane waits for another warp.
#pragma once

#include <cstdint>

#include "../integers.h"
#include "staging.cuh"
#include "work.cuh"

namespace kfo::cuda {

template <typename T>
constexpr bool kHasLanes = sizeof(T) == kLaneElement;

template <typename T, int kQ>
__device__ __forceinline__ void add_scaled(T (&sum)[kQ], T factor, const T (&row)[kQ]) {
#pragma unroll
  for (int j = 0; j < kQ; ++j) sum[j] = fma(factor, row[j], sum[j]);
}

template <typename T, int kQ>
__device__ __forceinline__ void add_dot(T& sum, const T (&x)[kQ], const T (&y)[kQ]) {
#pragma unroll
  for (int j = 0; j < kQ; ++j) sum = fma(x[j], y[j], sum);
}

// Columns of dR that a lane computes at once.
constexpr int kChunk = 8;

template <typename T, int kQ>
class Lanes {
  static constexpr int kPitch = lane_pitch(kQ, sizeof(T)), kWidth = Vector<T>::kWidth;
  static constexpr int kVectors = (kQ + kWidth - 1) / kWidth;

 public:
  using Row = T[kQ];

  int p, q, lane, warp;
  int i;  // the lane's row; of a lane without one, the last

  __device__ __forceinline__ explicit Lanes(const Work<T>& work)
      : p(work.p),
        q(work.q),
        lane(static_cast<int>(threadIdx.x) % kWarp),
        warp(static_cast<int>(threadIdx.x) / kWarp),
        i(min(lane, work.p - 1)),
        work_(work),
        groups_(work.entry.by_q.quotient(kWarp)),
        group_(work.entry.by_q.quotient(lane)) {}

  // Copies of operands, complete after `wait`. Columns and rows beyond the problem's are zero.
  __device__ __forceinline__ int stage_R(Source source) {
    if (!work_.data.has(source)) return -1;
    const T* from = work_.row(source) + work_.entry.R;
    const int place = take(padded_size(p, p, sizeof(T))) + misalignment(from);
    stage(shared() + place, from, p, p, work_.entry.by_p);
    return place;
  }
  __device__ __forceinline__ int stage_L(Source source) { return staged(source, work_.entry.L, q, kQ); }
  __device__ __forceinline__ int stage_rows(Source source) {
    return staged(source, work_.first, work_.n * p, work_.n * p);
  }
  // A matrix of each warp, all of which the sums of dL overwrite in the end.
  __device__ __forceinline__ int room() {
    if (rooms_ < 0) rooms_ = free_;
    return take(kWarps * p * kPitch) + warp * p * kPitch;
  }
  // The sum of dR of each warp.
  __device__ __forceinline__ int room_for_dR() { return take(kWarps * p * pitch_of(p)); }
  __device__ __forceinline__ void wait() const {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  // Elements from one row of a matrix to the `count`-th after it.
  __device__ __forceinline__ int rows(int count) const { return count * kPitch; }
  // Row `row` of a matrix in shared memory.
  __device__ __forceinline__ void load(Row& x, int place, int row) const {
    const T* from = shared() + place + row * kPitch;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const Vector<T> values = reinterpret_cast<const Vector<T>*>(from)[v];
#pragma unroll
      for (int w = 0; w < kWidth; ++w)
        if (v * kWidth + w < kQ) x[v * kWidth + w] = values.at[w];
    }
  }
  // The lane's own row, if it has one.
  __device__ __forceinline__ void store(int place, int first, const Row& x) const {
    if (lane >= p) return;
    T* to = shared() + place + (first + lane) * kPitch;
#pragma unroll
    for (int j = 0; j < kQ; ++j) to[j] = x[j];
  }
  // Element (i, k) of a left factor.
  __device__ __forceinline__ T factor(int place, int row, int column) const {
    return shared()[place + row * pitch_of(p) + column];
  }

  // sum += x F and sum += x F^T for a right factor.
  __device__ __forceinline__ void add_times(Row& sum, const Row& x, int F) const {
#pragma unroll
    for (int a = 0; a < kQ; ++a) {
      Row row;
      load(row, F, a);
      add_scaled(sum, x[a], row);
    }
  }
  __device__ __forceinline__ void add_times_transposed(Row& sum, const Row& x, int F) const {
#pragma unroll
    for (int a = 0; a < kQ; ++a) {
      Row row;
      load(row, F, a);
      add_dot(sum[a], x, row);
    }
  }

  // Row a of X^T Y, the lanes of a group for all a, every group for its share of the rows.
  __device__ __forceinline__ void add_inner(Row& sum, int X, int first, int Y) const {
    if (group_ >= groups_) return;
    const T* column = shared() + X + first * kPitch + lane - group_ * q;
    // A constant number of steps: to unroll another, the compiler divides.
    constexpr int most = ceil_div(kWarp, kWarp / kQ);
#pragma unroll 4
    for (int step = 0; step < most; ++step) {
      const int row = group_ + step * groups_;
      if (row >= p) break;
      Row y;
      load(y, Y, row);
      add_scaled(sum, column[row * kPitch], y);
    }
  }

  // Elements first to first + kChunk of the lane's row of dR, for the first matrix of the warp or after others.
  __device__ __forceinline__ void add_dR(int dR, int first, const T (&part)[kChunk], bool after) const {
    if (lane >= p) return;
    T* to = shared() + dR + (warp * p + lane) * pitch_of(p) + first;
#pragma unroll
    for (int c = 0; c < kChunk; ++c)
      if (first + c < p) to[c] = after ? to[c] + part[c] : part[c];
  }

  // Sums of all warps, in their order: of dR, and of what `add_inner` left of dL, which takes the place of rooms.
  __device__ __forceinline__ void share_dL(const Row& dL) const {
    if (group_ >= groups_) return;
    T* to = shared() + rooms_ + ((warp * groups_ + group_) * q + lane - group_ * q) * kPitch;
#pragma unroll
    for (int j = 0; j < kQ; ++j) to[j] = dL[j];
  }
  __device__ __forceinline__ void write_dR(int dR) const {
    T* to = work_.share_of_dR();
    const T* from = shared() + dR;
    const int warps = min(work_.n, kWarps);
    for (int e = threadIdx.x; e < p * p; e += kThreads) {
      const int row = work_.entry.by_p.quotient(e), at = row * pitch_of(p) + e - row * p;
      T sum = 0;
      for (int w = 0; w < warps; ++w) sum += from[w * p * pitch_of(p) + at];
      to[e] = sum;
    }
  }
  __device__ __forceinline__ void write_dL() const {
    T* to = work_.share_of_dL();
    const T* from = shared() + rooms_;
    for (int e = threadIdx.x; e < q * q; e += kThreads) {
      const int row = work_.entry.by_q.quotient(e), at = row * kPitch + e - row * q;
      T sum = 0;
      for (int part = 0; part < kWarps * groups_; ++part) sum += from[part * q * kPitch + at];
      to[e] = sum;
    }
  }

  // The block's rows of an output; `bias`, if any, is added to each matrix.
  __device__ __forceinline__ void copy_out(Target target, int place, const T* bias = nullptr) const {
    T* to = work_.row(target) + work_.first;
    for (int e = threadIdx.x; e < work_.n * p * q; e += kThreads) {
      const int row = work_.entry.by_q.quotient(e);
      const T value = shared()[place + row * kPitch + e - row * q];
      to[e] = bias ? value + bias[e - work_.entry.by_p.quotient(row) * p * q] : value;
    }
  }

 private:
  const Work<T>& work_;
  int groups_, group_;  // of q lanes
  int free_ = 0, rooms_ = -1;

  static __device__ __forceinline__ T* shared() { return shared_array<T>(); }

  __device__ __forceinline__ int take(int elements) {
    const int place = free_;
    free_ += elements;
    return place;
  }

  // (rows, q) to rows that are kPitch apart, and zeros up to (padded, kQ).
  __device__ __forceinline__ int staged(Source source, int64_t offset, int rows, int padded) {
    if (!work_.data.has(source)) return -1;
    const T* from = work_.row(source) + offset;
    const int place = take(padded * kPitch);
    T* to = shared() + place;
#pragma unroll 1
    for (int e = threadIdx.x; e < rows * q; e += kThreads) {
      const int row = work_.entry.by_q.quotient(e);
      __pipeline_memcpy_async(to + row * kPitch + e - row * q, from + e, sizeof(T));
    }
    if (q == kQ) return place;
#pragma unroll 1
    for (int row = threadIdx.x; row < padded; row += kThreads)
      for (int j = row < rows ? q : 0; j < kQ; ++j) to[row * kPitch + j] = 0;
    return place;
  }
};

}  // namespace kfo::cuda
