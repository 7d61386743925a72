// M = R dY, S = ddR dY, N = G L, K = ddG L + G ddL;
// dG = S L^T + M ddL^T,  ddY = ddR^T N + R^T K,  dR = sum_b K dY^T,  dL = sum_b G^T S + ddG^T M.
#pragma once

#include "block.cuh"

namespace kfo::cuda {

// ddR, ddG and ddL may be absent: every product with an absent operand is no term.
template <typename T>
struct DoubleBackward {
  Table table;
  Operand<T> R, G, L, dY, ddR, ddG, ddL;
  Output<T> dG, ddY;
  T* scratch;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) double_backward_kernel(const __grid_constant__ DoubleBackward<T> args) {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  Block<T> block(args.table, args.scratch, reinterpret_cast<T*>(shared_memory));
  const int64_t rows = block.rows(), p = block.problem().p, q = block.problem().q;
  const bool need_R = args.table.dR_rows, need_G = args.dG.data, need_L = args.table.dL_rows, need_Y = args.ddY.data;
  const bool has_R = args.ddR.data, has_G = args.ddG.data, has_L = args.ddL.data, has_K = has_G || has_L;

  const Matrices<T> R = block.R(args.R), L = block.L(args.L), ddR = block.R(args.ddR), ddL = block.L(args.ddL);
  const Matrices<T> G = block.matrices(args.G), dY = block.matrices(args.dY), ddG = block.matrices(args.ddG);
  T* M = block.intermediate();
  T* S = block.intermediate();
  T* N = block.intermediate();
  T* K = block.intermediate();
  __syncthreads();

  if ((need_G && has_L) || (need_L && has_G)) write_products(M, rows, p, q, {R, dY, p});
  if ((need_G || need_L) && has_R) write_products(S, rows, p, q, {ddR, dY, p});
  if (need_Y && has_R) write_products(N, rows, p, q, {G, L, q});
  if ((need_R || need_Y) && has_K)
    write_products(K, rows, p, q, product_if(has_G, ddG, L, q), product_if(has_L, G, ddL, q));
  __syncthreads();

  T* partial = block.partials();
  if (need_R) {
    write_product_sum(partial, rows, p, p, product_if(has_K, block.view(K), dY.transposed(), q));
    partial += p * p;
  }
  if (need_L)
    write_product_sum(partial, rows, q, q, product_if(has_R, G.transposed(), block.view(S), p),
                      product_if(has_G, ddG.transposed(), block.view(M), p));
  if (need_G)
    write_products(block.rows_of(args.dG), rows, p, q, product_if(has_R, block.view(S), L.transposed(), q),
                   product_if(has_L, block.view(M), ddL.transposed(), q));
  if (need_Y)
    write_products(block.rows_of(args.ddY), rows, p, q, product_if(has_R, ddR.transposed(), block.view(N), p),
                   product_if(has_K, R.transposed(), block.view(K), p));
}

}  // namespace kfo::cuda
