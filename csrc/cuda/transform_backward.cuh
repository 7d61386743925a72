// M = R dY, N = G L;  dG = M L^T,  dR = sum_b N dY^T,  dL = sum_b G^T M.
#pragma once

#include "block.cuh"

namespace kfo::cuda {

template <typename T>
struct Backward {
  Table table;
  Operand<T> R, G, L, dY;
  Output<T> dG;
  T* scratch;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Backward<T> args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Block<T> block(args.table, args.scratch, reinterpret_cast<T*>(shared_memory));
  const int64_t rows = block.rows(), p = block.problem().p, q = block.problem().q;
  const bool need_R = args.table.dR_rows, need_G = args.dG.data, need_L = args.table.dL_rows;

  const Matrices<T> R = block.R(args.R), L = block.L(args.L);
  const Matrices<T> G = block.matrices(args.G), dY = block.matrices(args.dY);
  T* M = block.intermediate();
  T* N = block.intermediate();
  __syncthreads();

  if (need_G || need_L) write_products(M, rows, p, q, {R, dY, p});
  if (need_R) write_products(N, rows, p, q, {G, L, q});
  __syncthreads();

  T* partial = block.partials();
  if (need_R) {
    write_product_sum(partial, rows, p, p, {block.view(N), dY.transposed(), q});
    partial += p * p;
  }
  if (need_L) write_product_sum(partial, rows, q, q, {G.transposed(), block.view(M), p});
  if (need_G) write_products(block.rows_of(args.dG), rows, p, q, {block.view(M), L.transposed(), q});
}

}  // namespace kfo::cuda
