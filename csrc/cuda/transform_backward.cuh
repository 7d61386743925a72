// M = R dY, N = G L;  dG = M L^T,  dR = sum_b N dY^T,  dL = sum_b G^T M.
#pragma once

#include "block.cuh"
#include "transform_lanes.cuh"

namespace kfo::cuda {

template <typename T>
__device__ __forceinline__ void backward_by_products(const Work<T>& work) {
  Block<T> block(work);
  const bool need_R = work.data.needs(kdR), need_G = work.data.needs(kdG), need_L = work.data.needs(kdL);
  const Place R = block.stage_R(kR), L = block.stage_L(kL);
  const Place G = block.stage_rows(kG), dY = block.stage_rows(kdY);
  // M takes the place of N, and dG that of dY, which are read no more.
  const Place N = block.room(), M = N, dG = dY;

  block.compute(5, 0b01110, [&](int job) -> Job<T> {
    switch (job) {
      case 0:
        return need_R ? block.to_right(N, block.times(G, L)) : Job<T>{};
      case 1:
        return need_R ? block.to_dR(block.sum_outer(N, dY)) : Job<T>{};
      case 2:
        return need_G || need_L ? block.to_left(M, block.of(R, dY)) : Job<T>{};
      case 3:
        return need_L ? block.to_dL(block.sum_inner(G, M)) : Job<T>{};
      default:
        return need_G ? block.to_right(dG, block.times_transposed(M, L)) : Job<T>{};
    }
  });
  if (need_G) block.copy_out(kdG, dG);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>())
    backward_kernel(const __grid_constant__ Arguments<T, Table> args) {
  const Work<T> work(args);
  if constexpr (kHasLanes<T>)
    if (work.entry.path == kLanes) return backward_by_lanes<T, kLaneColumns>(work);
  backward_by_products(work);
}

}  // namespace kfo::cuda
