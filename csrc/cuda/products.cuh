// Sums of matrix products, spread over the threads of a block: one thread computes one element, in a fixed order.
#pragma once

#include <cstdint>

namespace kfo::cuda {

// A batch of strided matrices. A batch stride of 0 is one matrix for all.
template <typename T>
struct Matrices {
  const T* data;
  int64_t batch, row, col;

  __device__ Matrices transposed() const { return {data, batch, col, row}; }
};

template <typename T>
__device__ Matrices<T> one_matrix(const T* data, int64_t cols) {
  return {data, 0, cols, 1};
}

// Packed (batch, rows, cols).
template <typename T>
__device__ Matrices<T> many_matrices(const T* data, int64_t rows, int64_t cols) {
  return {data, rows * cols, cols, 1};
}

// A_b B_b, contracted over `depth`. A depth of 0 is no term at all: its matrices are never read.
template <typename T>
struct Product {
  Matrices<T> A, B;
  int64_t depth;

  // sum + (A_b B_b)[i, j]
  __device__ T add_to(T sum, int64_t b, int64_t i, int64_t j) const {
    if (depth == 0) return sum;
    const T* a = A.data + b * A.batch + i * A.row;
    const T* c = B.data + b * B.batch + j * B.col;
    for (int64_t k = 0; k < depth; ++k) sum = fma(a[k * A.col], c[k * B.row], sum);
    return sum;
  }
};

// The product if it is wanted, else no term.
template <typename T>
__device__ Product<T> product_if(bool wanted, const Matrices<T>& A, const Matrices<T>& B, int64_t depth) {
  return {A, B, wanted ? depth : 0};
}

// out_b = X_b + Y_b + offset for every b < count; out is packed (count, rows, cols); offset is (rows, cols) or null.
template <typename T>
__device__ void write_products(T* out, int64_t count, int64_t rows, int64_t cols, const Product<T>& X,
                               const Product<T>& Y = {}, const T* offset = nullptr) {
  const int64_t size = rows * cols;
  for (int64_t e = threadIdx.x; e < count * size; e += blockDim.x) {
    const int64_t b = e / size, ij = e % size, i = ij / cols, j = ij % cols;
    const T sum = Y.add_to(X.add_to(T(0), b, i, j), b, i, j);
    out[e] = offset ? sum + offset[ij] : sum;
  }
}

// out = sum over b < count of X_b + Y_b; out is packed (rows, cols).
template <typename T>
__device__ void write_product_sum(T* out, int64_t count, int64_t rows, int64_t cols, const Product<T>& X,
                                  const Product<T>& Y = {}) {
  for (int64_t e = threadIdx.x; e < rows * cols; e += blockDim.x) {
    const int64_t i = e / cols, j = e % cols;
    T sum = 0;
    for (int64_t b = 0; b < count; ++b) sum = Y.add_to(X.add_to(sum, b, i, j), b, i, j);
    out[e] = sum;
  }
}

}  // namespace kfo::cuda
