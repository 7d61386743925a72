// The three orders, written once over either layout. `first` is false when an earlier block of the same chunk has
// already written its part of dR and dL.
#pragma once

#include "blocks.h"

namespace {

template <class T>
Factor<T> plain(const T* data, int64_t n) {
  return {data, n, 1};
}
template <class T>
Factor<T> transposed(const T* data, int64_t n) {
  return {data, 1, n};
}

template <class T>
void clear_factor(T* data, int64_t n) {
  __builtin_memset(data, 0, static_cast<size_t>(n * n) * sizeof(T));
}

// What a block of an order keeps in scratch memory, in matrices: the intermediate results, and the operands and outputs
// too where they cannot be used in place.
struct Memory {
  int intermediates, all;
};

constexpr Memory kForwardMemory{1, 3};
// Y = R^T G L + bias
template <class T, class Block>
void forward(Block block, const Job<T>& job, bool) {
  const auto G = block.load(job.G);
  const auto N = block.matrix();
  block.right(plain(job.L, job.q), G, N);
  const auto Y = block.matrix_for(job.Y);
  block.left(transposed(job.R, job.p), N, Y);
  block.store(Y, job.Y, job.bias);
}

constexpr Memory kBackwardMemory{2, 5};
// dG = R dY L^T, dR = sum G L dY^T, dL = sum G^T R dY
template <class T, class Block>
void backward(Block block, const Job<T>& job, bool first) {
  const auto dY = block.load(job.dY);
  const auto G = job.dR || job.dL ? block.load(job.G) : dY;
  if (job.dG.data || job.dL) {
    const auto M = block.matrix();
    block.left(plain(job.R, job.p), dY, M);
    if (job.dG.data) {
      const auto dG = block.matrix_for(job.dG);
      block.right(transposed(job.L, job.q), M, dG);
      block.store(dG, job.dG, {});
    }
    if (job.dL) block.right_gradient(G, M, job.dL, !first);
  }
  if (job.dR) {
    const auto N = block.matrix();
    block.right(plain(job.L, job.q), G, N);
    block.left_gradient(N, dY, job.dR, !first);
  }
}

constexpr Memory kDoubleBackwardMemory{4, 9};
// ddY = ddR^T G L + R^T (ddG L + G ddL)      dR = sum (ddG L + G ddL) dY^T
// dG = ddR dY L^T + R dY ddL^T               dL = sum (G^T ddR + ddG^T R) dY
template <class T, class Block>
void double_backward(Block block, const Job<T>& job, bool first) {
  const bool has_ddG = job.ddG.data, has_ddL = job.ddL, has_ddR = job.ddR;
  const auto G = block.load(job.G);
  const auto dY = block.load(job.dY);
  const auto ddG = has_ddG ? block.load(job.ddG) : G;

  if (job.dG.data || job.dL) {
    const auto M = block.matrix(), S = block.matrix();
    if (has_ddR) block.left(plain(job.ddR, job.p), dY, S);
    if (has_ddL || has_ddG) block.left(plain(job.R, job.p), dY, M);
    if (job.dG.data) {
      const auto dG = block.matrix_for(job.dG);
      if (has_ddR) block.right(transposed(job.L, job.q), S, dG);
      if (has_ddL) block.right(transposed(job.ddL, job.q), M, dG, has_ddR);
      if (!has_ddR && !has_ddL) block.clear(dG);
      block.store(dG, job.dG, {});
    }
    if (job.dL) {
      if (has_ddR) block.right_gradient(G, S, job.dL, !first);
      if (has_ddG) block.right_gradient(ddG, M, job.dL, !first || has_ddR);
      if (!has_ddR && !has_ddG && first) clear_factor(job.dL, job.q);
    }
  }

  if (job.dR || job.ddY.data) {
    const bool has_K = has_ddG || has_ddL;
    const auto K = block.matrix();
    if (has_ddG) block.right(plain(job.L, job.q), ddG, K);
    if (has_ddL) block.right(plain(job.ddL, job.q), G, K, has_ddG);
    if (job.dR) {
      if (has_K)
        block.left_gradient(K, dY, job.dR, !first);
      else if (first)
        clear_factor(job.dR, job.p);
    }
    if (job.ddY.data) {
      const auto ddY = block.matrix_for(job.ddY);
      if (has_ddR) {
        const auto N = block.matrix();
        block.right(plain(job.L, job.q), G, N);
        block.left(transposed(job.ddR, job.p), N, ddY);
      }
      if (has_K) block.left(transposed(job.R, job.p), K, ddY, has_ddR);
      if (!has_ddR && !has_K) block.clear(ddY);
      block.store(ddY, job.ddY, {});
    }
  }
}

}  // namespace
