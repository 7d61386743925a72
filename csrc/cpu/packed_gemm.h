// Packed GEMM: both operands are copied to scratch memory a block at a time, so that a tile reads them sequentially
// whatever their strides. Sums have the order of `product`.
#pragma once

#include "products.h"
#include "transpose.h"

namespace {

constexpr int64_t kPackedRows = 192;              // rows of a packed block of A, which stays in the L2 cache
constexpr int64_t kPackedVectors = kTileVectors;  // of a row of a packed block of X: one strip

// Elements of scratch memory that `packed_gemm` needs.
template <class T>
constexpr int64_t packed_gemm_scratch() {
  return kStripDepth * (kPackedRows + kPackedVectors * kLanes<T>);
}

// Whether packing costs little beside the product, and strided reads would cost much.
inline bool packing_pays(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kLeast = 64, kWork = int64_t{1} << 21;
  return M >= kLeast && N >= kLeast && K >= kLeast && M * N * K >= kWork;
}

// Whether dot products, which reduce lanes for each element of the result, cost more than packing the operands.
inline bool are_dots_slow(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kLeast = 16, kShortest = 8, kLanesAgainstCopies = 4;
  return M >= kLeast && N >= kLeast && K >= kShortest && K * (M + N) <= kLanesAgainstCopies * M * N;
}

// out[k * width + m] = A(m, k), where either the rows or the columns of A are contiguous.
template <class T>
void pack(Factor<T> A, int64_t rows, int64_t depth, T* out, int64_t width) {
  if (A.row == 1) {
    for (int64_t k = 0; k < depth; ++k)
      __builtin_memcpy(out + k * width, A.data + k * A.column, static_cast<size_t>(rows) * sizeof(T));
  } else {
    gather(rows, depth, [&](int64_t m) { return A.data + m * A.row; }, out, width);
  }
}

// C (M, N) = A (M, K) X^T (K, N), or C += A X^T.
template <class T>
void packed_gemm(PrefetchQueue* prefetch, int64_t M, int64_t N, int64_t K, Factor<T> A, Factor<T> X, Rows<T> C,
                 bool add, T* memory) {
  constexpr int W = kLanes<T>;
  T* rows_of_A = memory;
  T* strip_of_X = memory + kStripDepth * kPackedRows;
  for (int64_t k = 0; k < K; k += kStripDepth) {
    const int64_t depth = smaller(K - k, kStripDepth);
    const bool keep = add || k > 0;
    Cut(M, kPackedRows).each([&](int64_t m, int64_t rows) {
      const int64_t width = round_up(rows, W);
      pack<T>({A.data + m * A.row + k * A.column, A.row, A.column}, rows, depth, rows_of_A, width);
      const Factor<T> a{rows_of_A, 1, width};
      for (int64_t n = 0; n < N; n += kPackedVectors * W) {
        const int64_t columns = smaller(N - n, kPackedVectors * W), stride = round_up(columns, W);
        pack<T>({X.data + n * X.row + k * X.column, X.row, X.column}, columns, depth, strip_of_X, stride);
        product<T>(prefetch, rows, columns, depth, a, {strip_of_X, stride}, {C.data + m * C.row + n, C.row}, keep);
      }
    });
  }
}

}  // namespace
