// Y = R^T G L (+ bias).
#pragma once

#include "block.cuh"
#include "transform_lanes.cuh"

namespace kfo::cuda {

template <typename T>
__device__ __forceinline__ void forward_by_products(const Work<T>& work) {
  Block<T> block(work);
  const Place R = block.stage_R(kR), L = block.stage_L(kL), G = block.stage_rows(kG);
  const Place N = block.room(), Y = G;  // Y takes the place of G, which is read no more

  block.compute(2, 0b10, [&](int job) {
    return job == 0 ? block.to_right(N, block.times(G, L)) : block.to_left(Y, block.of_transposed(R, N));
  });
  if (work.data.has(kBias)) {
    block.add_bias(Y);
    __syncthreads();
  }
  block.copy_out(kY, Y);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>())
    forward_kernel(const __grid_constant__ Arguments<T, Table> args) {
  const Work<T> work(args);
  if constexpr (kHasLanes<T>)
    if (work.entry.path == kLanes) return forward_by_lanes<T, kLaneColumns>(work);
  forward_by_products(work);
}

}  // namespace kfo::cuda
