// Y = R^T G L (+ bias).
#pragma once

#include "block.cuh"

namespace kfo::cuda {

template <typename T>
struct Forward {
  Table table;
  Operand<T> R, G, L, bias;
  Output<T> Y;
  T* scratch;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward<T> args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Block<T> block(args.table, args.scratch, reinterpret_cast<T*>(shared_memory));
  const int64_t rows = block.rows(), p = block.problem().p, q = block.problem().q;

  const Matrices<T> R = block.R(args.R), L = block.L(args.L), G = block.matrices(args.G);
  T* N = block.intermediate();
  __syncthreads();

  write_products(N, rows, p, q, {G, L, q});
  __syncthreads();

  write_products(block.rows_of(args.Y), rows, p, q, {R.transposed(), block.view(N), p}, {},
                 block.at(args.bias, block.problem().bias));
}

}  // namespace kfo::cuda
