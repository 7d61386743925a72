// The three orders of the transform for matrices of at most 32 rows and kQ columns, a warp for each matrix. The
// formulas are those of the orders' own files.
#pragma once

#include "lanes.cuh"

namespace kfo::cuda {

template <typename T, int kQ>
__device__ __forceinline__ void forward_by_lanes(const Work<T>& work) {
  Lanes<T, kQ> lanes(work);
  const int R = lanes.stage_R(kR), L = lanes.stage_L(kL), G = lanes.stage_rows(kG), N = lanes.room();
  lanes.wait();
  for (int b = lanes.warp; b < work.n; b += kWarps) {
    const int first = b * lanes.p;
    T g[kQ], n[kQ] = {}, y[kQ] = {};
    lanes.load(g, G, first + lanes.i);
    lanes.add_times(n, g, L);
    lanes.store(N, 0, n);
    __syncwarp();
#pragma unroll 4
    for (int k = 0; k < lanes.p; ++k) {
      lanes.load(n, N, k);
      add_scaled(y, lanes.factor(R, k, lanes.i), n);
    }
    lanes.store(G, first, y);  // whose row no other lane reads
    __syncwarp();
  }
  __syncthreads();
  lanes.copy_out(kY, G, work.data.has(kBias) ? work.row(kBias) + work.entry.bias : nullptr);
}

template <typename T, int kQ>
__device__ __forceinline__ void backward_by_lanes(const Work<T>& work) {
  const bool need_R = work.data.needs(kdR), need_G = work.data.needs(kdG), need_L = work.data.needs(kdL);
  Lanes<T, kQ> lanes(work);
  const int R = lanes.stage_R(kR), L = lanes.stage_L(kL), G = lanes.stage_rows(kG), dY = lanes.stage_rows(kdY);
  const int dR = lanes.room_for_dR(), M = lanes.room();
  lanes.wait();
  T dL[kQ] = {};
  for (int b = lanes.warp; b < work.n; b += kWarps) {
    const int first = b * lanes.p;
    T n[kQ] = {}, m[kQ] = {};
    if (need_R) {
      T g[kQ];
      lanes.load(g, G, first + lanes.i);
      lanes.add_times(n, g, L);
    }
#pragma unroll 1
    for (int chunk = 0; chunk < lanes.p; chunk += kChunk) {
      T part[kChunk] = {};
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (chunk + c >= lanes.p) continue;
        T y[kQ];
        lanes.load(y, dY, first + chunk + c);
        add_scaled(m, lanes.factor(R, lanes.i, chunk + c), y);
        add_dot(part[c], n, y);
      }
      if (need_R) lanes.add_dR(dR, chunk, part, b >= kWarps);
    }
    lanes.store(M, 0, m);
    __syncwarp();  // M is there, and dY read
    if (need_L) lanes.add_inner(dL, G, first, M);
    if (need_G) {
      T g[kQ] = {};
      lanes.add_times_transposed(g, m, L);
      lanes.store(dY, first, g);
    }
    __syncwarp();  // M is read
  }
  __syncthreads();
  lanes.share_dL(dL);
  __syncthreads();
  if (need_R) lanes.write_dR(dR);
  if (need_L) lanes.write_dL();
  if (need_G) lanes.copy_out(kdG, dY);
}

template <typename T, int kQ>
__device__ __forceinline__ void double_backward_by_lanes(const Work<T>& work) {
  const bool need_R = work.data.needs(kdR), need_G = work.data.needs(kdG), need_L = work.data.needs(kdL),
             need_Y = work.data.needs(kddY);
  const bool has_R = work.data.has(kddR), has_G = work.data.has(kddG), has_L = work.data.has(kddL);
  Lanes<T, kQ> lanes(work);
  const int R = lanes.stage_R(kR), L = lanes.stage_L(kL), ddR = lanes.stage_R(kddR), ddL = lanes.stage_L(kddL);
  const int G = lanes.stage_rows(kG), dY = lanes.stage_rows(kdY), ddG = lanes.stage_rows(kddG);
  // S takes the place of dY, which the warp reads no more then.
  const int dR = lanes.room_for_dR(), M = lanes.room(), N = lanes.room(), K = lanes.room();
  lanes.wait();
  T dL[kQ] = {};
  for (int b = lanes.warp; b < work.n; b += kWarps) {
    const int first = b * lanes.p;
    T k_row[kQ] = {};
    {
      T g[kQ], n[kQ] = {};
      lanes.load(g, G, first + lanes.i);
      lanes.add_times(n, g, L);
      lanes.store(N, 0, n);
      if (has_L) lanes.add_times(k_row, g, ddL);
      if (has_G) {
        lanes.load(g, ddG, first + lanes.i);
        lanes.add_times(k_row, g, L);
      }
      lanes.store(K, 0, k_row);
    }
    T m[kQ] = {}, s[kQ] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < lanes.p; chunk += kChunk) {
      T part[kChunk] = {};
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        if (chunk + c >= lanes.p) continue;
        T y[kQ];
        lanes.load(y, dY, first + chunk + c);
        add_scaled(m, lanes.factor(R, lanes.i, chunk + c), y);
        if (has_R) add_scaled(s, lanes.factor(ddR, lanes.i, chunk + c), y);
        add_dot(part[c], k_row, y);
      }
      if (need_R) lanes.add_dR(dR, chunk, part, b >= kWarps);
    }
    lanes.store(M, 0, m);
    __syncwarp();  // dY is read
    lanes.store(dY, first, s);
    __syncwarp();  // M, S, N and K are there
    if (need_L && has_R) lanes.add_inner(dL, G, first, dY + lanes.rows(first));
    if (need_L && has_G) lanes.add_inner(dL, ddG, first, M);
    T ddy[kQ] = {};
    if (need_Y) {
#pragma unroll 4
      for (int k = 0; k < lanes.p; ++k) {
        T row[kQ];
        lanes.load(row, K, k);
        add_scaled(ddy, lanes.factor(R, k, lanes.i), row);
        if (!has_R) continue;
        lanes.load(row, N, k);
        add_scaled(ddy, lanes.factor(ddR, k, lanes.i), row);
      }
    }
    __syncwarp();  // G, S, N, K and M are read
    if (need_Y) lanes.store(G, first, ddy);
    if (need_G) {
      T g[kQ] = {};
      lanes.add_times_transposed(g, s, L);
      if (has_L) lanes.add_times_transposed(g, m, ddL);
      lanes.store(dY, first, g);
    }
  }
  __syncthreads();
  lanes.share_dL(dL);
  __syncthreads();
  if (need_R) lanes.write_dR(dR);
  if (need_L) lanes.write_dL();
  if (need_G) lanes.copy_out(kdG, dY);
  if (need_Y) lanes.copy_out(kddY, G);
}

}  // namespace kfo::cuda
