// M = R dY, S = ddR dY, N = G L, K = ddG L + G ddL;
// dG = S L^T + M ddL^T,  dL = sum_b G^T S + ddG^T M,  dR = sum_b K dY^T,  ddY = ddR^T N + R^T K.
#pragma once

#include "block.cuh"
#include "transform_lanes.cuh"

namespace kfo::cuda {

// ddR, ddG and ddL may be absent: every product with an absent operand is no term.
template <typename T>
__device__ __forceinline__ void double_backward_by_products(const Work<T>& work) {
  Block<T> block(work);
  const bool need_R = work.data.needs(kdR), need_G = work.data.needs(kdG), need_L = work.data.needs(kdL),
             need_Y = work.data.needs(kddY);
  const Intermediates use(need_R, need_G, need_L, need_Y, work.data.has(kddR), work.data.has(kddG),
                          work.data.has(kddL));

  const Place R = block.stage_R(kR), L = block.stage_L(kL);
  const Place ddR = block.stage_R(kddR), ddL = block.stage_L(kddL);
  const Place G = block.stage_rows(kG), dY = block.stage_rows(kdY), ddG = block.stage_rows(kddG);
  // An absent intermediate is an absent operand of what is made of it.
  const Place M = use.M ? block.room() : kAbsent, S = use.S ? block.room() : kAbsent;
  const Place N = use.N ? block.room() : kAbsent, K = use.K ? block.room() : kAbsent;
  const Place dG = dY, ddY = G;  // results take the place of what is read no more

  block.compute(8, 0b01010000, [&](int job) -> Job<T> {
    switch (job) {
      case 0:
        return use.M ? block.to_left(M, block.of(R, dY)) : Job<T>{};
      case 1:
        return use.S ? block.to_left(S, block.of(ddR, dY)) : Job<T>{};
      case 2:
        return use.N ? block.to_right(N, block.times(G, L)) : Job<T>{};
      case 3:
        return use.K ? block.to_right(K, block.times(ddG, L), block.times(G, ddL)) : Job<T>{};
      case 4:
        return need_R ? block.to_dR(block.sum_outer(K, dY)) : Job<T>{};
      case 5:
        return need_L ? block.to_dL(block.sum_inner(G, S), block.sum_inner(ddG, M)) : Job<T>{};
      case 6:
        return need_G ? block.to_right(dG, block.times_transposed(S, L), block.times_transposed(M, ddL)) : Job<T>{};
      default:
        return need_Y ? block.to_left(ddY, block.of_transposed(ddR, N), block.of_transposed(R, K)) : Job<T>{};
    }
  });
  if (need_G) block.copy_out(kdG, dG);
  if (need_Y) block.copy_out(kddY, ddY);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, resident_blocks<T>())
    double_backward_kernel(const __grid_constant__ Arguments<T, Table> args) {
  const Work<T> work(args);
  if constexpr (kHasLanes<T>)
    if (work.entry.path == kLanes) return double_backward_by_lanes<T, kLaneColumns>(work);
  double_backward_by_products(work);
}

}  // namespace kfo::cuda
