// Y = R^T G L (+ bias).
#pragma once

#include "block.cuh"

namespace kfo::cuda {

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const __grid_constant__ Arguments<T, Table> args) {
  Block<T> block(args);
  const Place R = block.stage_R(kR), L = block.stage_L(kL), G = block.stage_rows(kG);
  const Place N = block.room(), Y = G;  // Y takes the place of G, which is read no more

  block.compute(2, 0b10, [&](int job) {
    return job == 0 ? block.to_right(N, block.times(G, L)) : block.to_left(Y, block.of_transposed(R, N));
  });
  if (args.data.has(kBias)) {
    block.add_bias(Y);
    __syncthreads();
  }
  block.copy_out(kY, Y);
}

}  // namespace kfo::cuda
