// The two small matrix products that the transform's orders are made of, `product` and `dots`, and what convolutions
// share with them. Both accumulate in a fixed order that depends on sizes only.
#pragma once

#include "../integers.h"
#include "prefetch.h"
#include "vec.h"

namespace {

using kfo::ceil_div;
using kfo::round_up;
using kfo::smaller;
using kfo::cpu::PrefetchQueue;

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

// n in as few parts of about the same size as hold `most` each: first the longer ones, which have one more.
struct Cut {
  int64_t parts, size, longer;

  Cut(int64_t n, int64_t most) : parts(ceil_div(n, most)), size(n), longer(0) {
    if (parts < 2) return;
    // The only division, and of 32 bits where that will do: of 64 it takes as long as a small tile.
    size = n >> 32 ? n / parts : static_cast<uint32_t>(n) / static_cast<uint32_t>(parts);
    longer = n - size * parts;
  }

  // Calls run(begin, size) for each part.
  template <class Run>
  void each(Run run) const {
    for (int64_t part = 0, begin = 0; part < parts; ++part) {
      const int64_t length = size + (part < longer);
      run(begin, length);
      begin += length;
    }
  }
};

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

// Number of repeats of a product, and the strides of A, X and C between them.
struct Times {
  int64_t count = 1, a_step = 0, x_step = 0, c_step = 0;
};

// Makes an address that moves the only one: the compiler would keep one for every row, in memory.
template <class T>
inline void keep_one(T*& moving) {
  asm("" : "+r"(moving));
}

// The compiler would rather read it again from memory, at each use.
template <class V>
inline void keep_in_register(V& vector) {
  asm("" : "+v"(vector));
}

// One register tile of C = A X, several times over. `lanes` of its last vector exist.
// A tile of few sums takes every kSplit-th k in a sum of its own, since a sum waits for its previous addition.
template <class T, int M, int N, bool kPartial>
void product_tile(PrefetchQueue* prefetch, Factor<T> A, Rows<const T> X, Rows<T> C, int64_t K, int lanes, bool add,
                  Times times) {
  constexpr int W = kLanes<T>, kSplit = M * N >= 8 ? 1 : M * N >= 4 ? 2 : 4;
  const auto load_row = [lanes](const T* x, int n) {
    return kPartial ? load_first(x + n * W, lanes) : load(x + n * W);
  };
  for (int64_t i = 0; i < times.count; ++i) {
    prefetch_next(prefetch);
    const T* x = X.data + i * times.x_step;
    // A pointer for each kApart rows of A: the others are within reach of an address, without a register of their own.
    constexpr int kApart = 3, kPointers = ceil_div(M, kApart);
    const T* a[kPointers];
#pragma GCC unroll 16
    for (int m = 0; m < kPointers; ++m) a[m] = A.data + i * times.a_step + m * kApart * A.row;
    T* c = C.data + i * times.c_step;
    Vec<T> sums[kSplit][M][N] = {};
    const auto step = [&](int s) {
      Vec<T> row[N];
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) row[n] = load_row(x, n);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const Vec<T> factor = broadcast(a[m / kApart][m % kApart * A.row]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[s][m][n] = multiply_add(factor, row[n], sums[s][m][n]);
      }
      x += X.row;
#pragma GCC unroll 16
      for (int m = 0; m < kPointers; ++m) a[m] += A.column;
    };
    int64_t k = 0;
    for (; k + kSplit <= K; k += kSplit) {
#pragma GCC unroll 16
      for (int s = 0; s < kSplit; ++s) step(s);
    }
    for (; k < K; ++k) step(0);
    if (kSplit > 1) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
          for (int s = 1; s < kSplit; ++s) sums[0][m][n] += sums[s][m][n];
    }
    // To what is there at last, not first: rounding grows with the longest sum.
    if (add) {
      const T* from = c;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[0][m][n] += load_row(from, n);
        from += C.row;
        keep_one(from);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        if (kPartial)
          store_first(c + n * W, sums[0][m][n], lanes);
        else
          store(c + n * W, sums[0][m][n]);
      }
      c += C.row;
      keep_one(c);
    }
  }
}

template <class T>
using ProductTile = void (*)(PrefetchQueue*, Factor<T>, Rows<const T>, Rows<T>, int64_t, int, bool, Times);

template <class T, int N, bool kPartial, int... M>
ProductTile<T> product_tile_of(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr ProductTile<T> kTiles[] = {product_tile<T, M + 1, N, kPartial>...};
  return kTiles[rows - 1];
}

// All tiles of a strip of C that is N vectors wide. Those of one size are one call, where the product is taken once.
template <class T, int N, bool kPartial>
void product_strip(PrefetchQueue* prefetch, int64_t M, int64_t K, Factor<T> A, Rows<const T> X, Rows<T> C, int lanes,
                   bool add, Times times) {
  constexpr int kRows = tile_rows(N);
  const auto run = [&](PrefetchQueue* meanwhile, int64_t begin, int64_t rows, Times repeated) {
    product_tile_of<T, N, kPartial>(rows, std::make_integer_sequence<int, kRows>{})(
        meanwhile, {A.data + begin * A.row, A.row, A.column}, X, {C.data + begin * C.row, C.row}, K, lanes, add,
        repeated);
  };
  const Cut tiles(M, kRows);
  if (times.count == 1) {
    const int64_t size = tiles.size, longer = size + 1, rest = tiles.parts - tiles.longer;
    if (tiles.longer) run(prefetch, 0, longer, {tiles.longer, longer * A.row, 0, longer * C.row});
    run(prefetch, tiles.longer * longer, size, {rest, size * A.row, 0, size * C.row});
  } else {
    tiles.each([&](int64_t begin, int64_t rows) {
      prefetch_next(prefetch);
      run(nullptr, begin, rows, times);
    });
  }
}

// Rows of X of a strip: 24 KB with AVX2, in the first-level cache; 64 KB with AVX-512, in the second.
constexpr int64_t kStripDepth = 256;

// C (M, N) = A (M, K) X (K, N), or C += A X.
template <class T>
void product(PrefetchQueue* prefetch, int64_t M, int64_t N, int64_t K, Factor<T> A, Rows<const T> X, Rows<T> C,
             bool add = false, Times times = {}) {
  constexpr int W = kLanes<T>;
  const int64_t vectors = N / W;
  for (int64_t k = 0; k < K; k += kStripDepth) {
    const int64_t depth = smaller(K - k, kStripDepth);
    const Factor<T> a{A.data + k * A.column, A.row, A.column};
    const T* x = X.data + k * X.row;
    const bool keep = add || k > 0;
    Cut(vectors, kTileVectors).each([&](int64_t begin, int64_t strip) {
      const Rows<const T> x_strip{x + begin * W, X.row};
      const Rows<T> c_strip{C.data + begin * W, C.row};
      switch (strip) {
        case 1:
          product_strip<T, 1, false>(prefetch, M, depth, a, x_strip, c_strip, W, keep, times);
          break;
        case 2:
          product_strip<T, 2, false>(prefetch, M, depth, a, x_strip, c_strip, W, keep, times);
          break;
        case 3:
          product_strip<T, 3, false>(prefetch, M, depth, a, x_strip, c_strip, W, keep, times);
          break;
        case 4:
          product_strip<T, 4, false>(prefetch, M, depth, a, x_strip, c_strip, W, keep, times);
          break;
      }
    });
    if (const int lanes = static_cast<int>(N % W))
      product_strip<T, 1, true>(prefetch, M, depth, a, {x + vectors * W, X.row}, {C.data + vectors * W, C.row}, lanes,
                                keep, times);
  }
}

// Operand of `dots`: row m is `count` runs of `length` contiguous elements, the runs `step` apart.
struct Runs {
  int64_t count, length, step;
};

// `times` register tiles of C, side by side.
template <class T, int M, int N>
void dots_tile(PrefetchQueue* prefetch, Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs, bool add,
               int64_t times) {
  constexpr int W = kLanes<T>, kSums = M * N;
  constexpr int kGroup = kSums >= W ? W : power_of_two(kSums), kPadded = static_cast<int>(round_up(kSums, kGroup));
  const int64_t whole = runs.length / W * W;
  const int rest = static_cast<int>(runs.length - whole);
  for (int64_t i = 0; i < times; ++i) {
    prefetch_next(prefetch);
    Vec<T> sums[kPadded] = {};
    const auto step = [&](const T* a, const T* x, auto load_vector) {
      Vec<T> column[M];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) column[m] = load_vector(a + m * A.row);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        Vec<T> other = load_vector(x + n * X.row);
        keep_in_register(other);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sums[m * N + n] = multiply_add(column[m], other, sums[m * N + n]);
      }
    };
    for (int64_t r = 0; r < runs.count; ++r) {
      const T* a = A.data + r * runs.step;
      const T* x = X.data + i * N * X.row + r * runs.step;
      for (int64_t k = 0; k < whole; k += W) step(a + k, x + k, [](const T* p) { return load(p); });
      if (rest) step(a + whole, x + whole, [rest](const T* p) { return load_first(p, rest); });
    }
    alignas(64) T totals[round_up(kPadded, W)];
#pragma GCC unroll 16
    for (int i = 0; i < kPadded; i += kGroup) store(totals + i, lane_sums<T, kGroup>(sums + i));
    T* c = C.data + i * N;
    if (add) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) c[m * C.row + n] += totals[m * N + n];
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) __builtin_memcpy(c + m * C.row, totals + m * N, N * sizeof(T));
    }
  }
}

template <class T>
using DotsTile = void (*)(PrefetchQueue*, Rows<const T>, Rows<const T>, Rows<T>, Runs, bool, int64_t);

// Of a tile with M rows: as many columns as registers hold sums.
constexpr int dots_columns(int M) { return (kRegisters == 16 ? 12 : 16) / M; }
constexpr int kDotsRows = kRegisters == 16 ? 3 : 4;

template <class T, int M, int... N>
DotsTile<T> dots_tile_of(int64_t columns, std::integer_sequence<int, N...>) {
  static constexpr DotsTile<T> kTiles[] = {dots_tile<T, M, N + 1>...};
  return kTiles[columns - 1];
}

// All tiles of a strip of C that is M rows high. Those of one size are one call.
template <class T, int M>
void dots_strip(PrefetchQueue* prefetch, int64_t N, Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs, bool add) {
  constexpr int kColumns = dots_columns(M);
  const auto run = [&](int64_t n, int64_t columns, int64_t times) {
    dots_tile_of<T, M>(columns, std::make_integer_sequence<int, kColumns>{})(prefetch, A, {X.data + n * X.row, X.row},
                                                                             {C.data + n, C.row}, runs, add, times);
  };
  const Cut tiles(N, kColumns);
  if (tiles.longer) run(0, tiles.size + 1, tiles.longer);
  run(tiles.longer * (tiles.size + 1), tiles.size, tiles.parts - tiles.longer);
}

// C (M, N) = A (M, K) X^T (K, N), or C += A X^T, with K running over `runs` of both operands.
template <class T>
void dots(PrefetchQueue* prefetch, int64_t M, int64_t N, Rows<const T> A, Rows<const T> X, Rows<T> C, Runs runs,
          bool add = false) {
  constexpr int64_t kCached = 131072 / sizeof(T);  // elements of X that stay cached while all of A passes by
  if (runs.count > 1 && runs.step == runs.length) runs = {1, runs.count * runs.length, 0};
  const int64_t block = round_up(kCached / (runs.count * runs.length) + 1, 16);
  for (int64_t n = 0; n < N; n += block)
    Cut(M, kDotsRows).each([&](int64_t m, int64_t strip) {
      const Rows<const T> a{A.data + m * A.row, A.row}, x{X.data + n * X.row, X.row};
      const Rows<T> c{C.data + m * C.row + n, C.row};
      const int64_t columns = smaller(block, N - n);
      switch (strip) {
        case 1:
          dots_strip<T, 1>(prefetch, columns, a, x, c, runs, add);
          break;
        case 2:
          dots_strip<T, 2>(prefetch, columns, a, x, c, runs, add);
          break;
        case 3:
          dots_strip<T, 3>(prefetch, columns, a, x, c, runs, add);
          break;
        case 4:
          dots_strip<T, 4>(prefetch, columns, a, x, c, runs, add);
          break;
      }
    });
}

}  // namespace
