// The two small matrix products every order is made of. Both accumulate in a fixed order that depends on sizes only.
#pragma once

#include "ahead.h"
#include "vec.h"

namespace {

using kfo::cpu::Ahead;

// Element (m, k) is data[m * row + k * column].
template <class T>
struct Factor {
  const T* data;
  int64_t row, column;
};

// Row r starts at data + r * row and its elements are contiguous.
template <class T>
struct Rows {
  T* data;
  int64_t row;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int power_of_two(int least) {
  int out = 1;
  while (out < least) out *= 2;
  return out;
}

// Rows of a register tile with N vectors a row: enough sums in flight to hide the latency, few enough to stay in
// registers.
constexpr int tile_rows(int vectors) {
  constexpr int kFree = kRegisters - (kRegisters == 16 ? 1 : 4);
  const int rows = (kFree - vectors) / vectors;
  return rows < 12 ? rows : 12;
}
constexpr int kTileVectors = kRegisters == 16 ? 3 : 4;

// One register tile of C = A X, `count` times over with steps of x_step and c_step. `lanes` of its last vector exist.
// A tile of few sums takes every kSplit-th k in a sum of its own, since a sum waits for its previous addition.
template <class T, int M, int N, bool kPartial>
void product_tile(Factor<T> A, Rows<const T> X, Rows<T> C, int64_t K, int lanes, bool add, int64_t count,
                  int64_t x_step, int64_t c_step) {
  constexpr int W = kLanes<T>, kSplit = M * N >= 8 ? 1 : M * N >= 4 ? 2 : 4;
  const auto load_row = [lanes](const T* x, int n) {
    return kPartial ? load_first(x + n * W, lanes) : load(x + n * W);
  };
  for (int64_t i = 0; i < count; ++i) {
    const T* x = X.data + i * x_step;
    const T* a = A.data;
    T* c = C.data + i * c_step;
    Vec<T> sums[kSplit][M][N] = {};
    const auto step = [&](int s) {
      Vec<T> row[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) row[n] = load_row(x, n);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec<T> factor = broadcast(a[m * A.row]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[s][m][n] = multiply_add(factor, row[n], sums[s][m][n]);
      }
      x += X.row;
      a += A.column;
    };
    if (add) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[0][m][n] = load_row(c + m * C.row, n);
    }
    int64_t k = 0;
    for (; k + kSplit <= K; k += kSplit) {
#pragma GCC unroll 16
      for (int s = 0; s < kSplit; ++s) step(s);
    }
    for (; k < K; ++k) step(0);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
        for (int s = 1; s < kSplit; ++s) sums[0][m][n] += sums[s][m][n];
        if (kPartial)
          store_first(c + m * C.row + n * W, sums[0][m][n], lanes);
        else
          store(c + m * C.row + n * W, sums[0][m][n]);
      }
  }
}

template <class T>
using ProductTile = void (*)(Factor<T>, Rows<const T>, Rows<T>, int64_t, int, bool, int64_t, int64_t, int64_t);

template <class T, int N, bool kPartial, int... M>
ProductTile<T> product_tile_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr ProductTile<T> kTiles[] = {product_tile<T, M + 1, N, kPartial>...};
  return kTiles[rows - 1];
}

// All tiles of a strip of C that is N vectors wide.
template <class T, int N, bool kPartial>
void product_strip(Ahead* ahead, int64_t M, int64_t K, Factor<T> A, Rows<const T> X, Rows<T> C, int lanes, bool add,
                   int64_t count, int64_t x_step, int64_t c_step) {
  constexpr int kRows = tile_rows(N);
  const int64_t tiles = ceil_div(M, kRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = M * t / tiles, end = M * (t + 1) / tiles;
    fetch_ahead(ahead);
    product_tile_of<T, N, kPartial>(end - begin, std::make_integer_sequence<int, kRows>{})(
        {A.data + begin * A.row, A.row, A.column}, X, {C.data + begin * C.row, C.row}, K, lanes, add, count, x_step,
        c_step);
  }
}

// C (M, N) = A (M, K) X (K, N), or C += A X, `count` times over: X and C move on by x_step and c_step, A stays.
template <class T>
void product(Ahead* ahead, int64_t M, int64_t N, int64_t K, Factor<T> A, Rows<const T> X, Rows<T> C, bool add = false,
             int64_t count = 1, int64_t x_step = 0, int64_t c_step = 0) {
  constexpr int W = kLanes<T>;
  constexpr int64_t kDepth = 256;  // rows of X that a strip keeps in the first-level cache
  const int64_t vectors = N / W, strips = ceil_div(vectors, kTileVectors);
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = smaller(K - k, kDepth);
    const Factor<T> a{A.data + k * A.column, A.row, A.column};
    const T* x = X.data + k * X.row;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t begin = vectors * s / strips, end = vectors * (s + 1) / strips;
      const Rows<const T> x_strip{x + begin * W, X.row};
      const Rows<T> c_strip{C.data + begin * W, C.row};
      const bool keep = add || k > 0;
      switch (end - begin) {
        case 1:
          product_strip<T, 1, false>(ahead, M, depth, a, x_strip, c_strip, W, keep, count, x_step, c_step);
          break;
        case 2:
          product_strip<T, 2, false>(ahead, M, depth, a, x_strip, c_strip, W, keep, count, x_step, c_step);
          break;
        case 3:
          product_strip<T, 3, false>(ahead, M, depth, a, x_strip, c_strip, W, keep, count, x_step, c_step);
          break;
        case 4:
          product_strip<T, 4, false>(ahead, M, depth, a, x_strip, c_strip, W, keep, count, x_step, c_step);
          break;
      }
    }
    if (const int lanes = static_cast<int>(N % W))
      product_strip<T, 1, true>(ahead, M, depth, a, {x + vectors * W, X.row}, {C.data + vectors * W, C.row}, lanes,
                                add || k > 0, count, x_step, c_step);
  }
}

// Operand of `dots`: row m is `count` runs of `length` contiguous elements, the runs `step` apart.
struct Runs {
  int64_t count, length, step;
};

template <class T, int M, int N>
void dots_tile(Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs, bool add) {
  constexpr int W = kLanes<T>, kSums = M * N;
  constexpr int kGroup = kSums >= W ? W : power_of_two(kSums), kPadded = (kSums + kGroup - 1) / kGroup * kGroup;
  Vec<T> sums[kPadded] = {};
  const int64_t whole = runs.length / W * W;
  const int rest = static_cast<int>(runs.length - whole);
  const auto step = [&](const T* a, const T* x, auto load_vector) {
    Vec<T> column[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) column[m] = load_vector(a + m * A.row);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const Vec<T> other = load_vector(x + n * X.row);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[m * N + n] = multiply_add(column[m], other, sums[m * N + n]);
    }
  };
  for (int64_t r = 0; r < runs.count; ++r) {
    const T* a = A.data + r * runs.step;
    const T* x = X.data + r * runs.step;
    for (int64_t k = 0; k < whole; k += W) step(a + k, x + k, [](const T* p) { return load(p); });
    if (rest) step(a + whole, x + whole, [rest](const T* p) { return load_first(p, rest); });
  }
  alignas(64) T totals[(kPadded + W - 1) / W * W];
#pragma GCC unroll 16
  for (int i = 0; i < kPadded; i += kGroup) store(totals + i, lane_sums<T, kGroup>(sums + i));
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      T& c = C.data[m * C.row + n];
      c = add ? c + totals[m * N + n] : totals[m * N + n];
    }
}

template <class T>
using DotsTile = void (*)(Rows<const T>, Rows<const T>, Rows<T>, Runs, bool);

// Of a tile with M rows: as many columns as registers hold sums.
constexpr int dots_columns(int M) { return (kRegisters == 16 ? 12 : 16) / M; }
constexpr int kDotsRows = kRegisters == 16 ? 3 : 4;

template <class T, int M, int... N>
DotsTile<T> dots_tile_of(int64_t columns, std::integer_sequence<int, N...>) {
  static constexpr DotsTile<T> kTiles[] = {dots_tile<T, M, N + 1>...};
  return kTiles[columns - 1];
}

// All tiles of a strip of C that is M rows high.
template <class T, int M>
void dots_strip(Ahead* ahead, int64_t N, Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs, bool add) {
  constexpr int kColumns = dots_columns(M);
  const int64_t tiles = ceil_div(N, kColumns);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = N * t / tiles, end = N * (t + 1) / tiles;
    fetch_ahead(ahead);
    dots_tile_of<T, M>(end - n, std::make_integer_sequence<int, kColumns>{})(A, {X.data + n * X.row, X.row},
                                                                             {C.data + n, C.row}, runs, add);
  }
}

// C (M, N) = A (M, K) X^T (K, N), or C += A X^T, with K running over `runs` of both operands.
template <class T>
void dots(Ahead* ahead, int64_t M, int64_t N, Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs,
          bool add = false) {
  constexpr int64_t kCached = 131072 / sizeof(T);  // elements of X that stay cached while all of A passes by
  if (runs.count > 1 && runs.step == runs.length) runs = {1, runs.count * runs.length, 0};
  const int64_t block = ceil_div(kCached / (runs.count * runs.length) + 1, 16) * 16;
  const int64_t strips = ceil_div(M, kDotsRows);
  for (int64_t n = 0; n < N; n += block)
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t m = M * s / strips, end = M * (s + 1) / strips;
      const Rows<const T> a{A.data + m * A.row, A.row}, x{X.data + n * X.row, X.row};
      const Rows<T> c{C.data + m * C.row + n, C.row};
      const int64_t columns = smaller(block, N - n);
      switch (end - m) {
        case 1:
          dots_strip<T, 1>(ahead, columns, a, x, c, runs, add);
          break;
        case 2:
          dots_strip<T, 2>(ahead, columns, a, x, c, runs, add);
          break;
        case 3:
          dots_strip<T, 3>(ahead, columns, a, x, c, runs, add);
          break;
        case 4:
          dots_strip<T, 4>(ahead, columns, a, x, c, runs, add);
          break;
      }
    }
}

}  // namespace
