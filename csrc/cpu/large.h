// Products from copies of their operands, a block at a time, so that a tile reads them in order whatever their layout.
// The sums are those of `product`, in the same order.
#pragma once

#include "products.h"
#include "transposition.h"

namespace {

constexpr int64_t kLargeRows = 192;              // rows of A of a block, which stays in the second-level cache
constexpr int64_t kLargeVectors = kTileVectors;  // of a row of a block of X: one strip

// Elements of memory that `product_of_copies` needs.
template <class T>
constexpr int64_t copies_memory() {
  return kStripDepth * (kLargeRows + kLargeVectors * kLanes<T>);
}

// Whether copies of the operands cost little beside the product, and their strides much.
inline bool is_large(int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kLeast = 64, kWork = int64_t{1} << 21;
  return M >= kLeast && N >= kLeast && K >= kLeast && M * N * K >= kWork;
}

// Whether dot products, which add up lanes for each element of the result, cost more than copies of their operands.
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
void product_of_copies(Ahead* ahead, int64_t M, int64_t N, int64_t K, Factor<T> A, Factor<T> X, Rows<T> C, bool add,
                       T* memory) {
  constexpr int W = kLanes<T>;
  T* rows_of_A = memory;
  T* strip_of_X = memory + kStripDepth * kLargeRows;
  for (int64_t k = 0; k < K; k += kStripDepth) {
    const int64_t depth = smaller(K - k, kStripDepth);
    const bool keep = add || k > 0;
    Cut(M, kLargeRows).each([&](int64_t m, int64_t rows) {
      const int64_t width = round_up(rows, W);
      pack<T>({A.data + m * A.row + k * A.column, A.row, A.column}, rows, depth, rows_of_A, width);
      const Factor<T> a{rows_of_A, 1, width};
      for (int64_t n = 0; n < N; n += kLargeVectors * W) {
        const int64_t columns = smaller(N - n, kLargeVectors * W), stride = round_up(columns, W);
        pack<T>({X.data + n * X.row + k * X.column, X.row, X.column}, columns, depth, strip_of_X, stride);
        product<T>(ahead, rows, columns, depth, a, {strip_of_X, stride}, {C.data + m * C.row + n, C.row}, keep);
      }
    });
  }
}

}  // namespace
