// How a problem is cut: its matrices into chunks of a block, and a block's products into the tiles of its threads. All
// depends on sizes alone. Plain host C++: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../integers.h"
#include "table.h"

namespace kfo::cuda {

// By what a problem's path is chosen: its sizes, or one path wherever it is possible.
enum class Choice : int8_t { by_size, products, lanes };

namespace detail {

// Where a warp computes each matrix, by sizes. With fewer rows most lanes would be idle, and with fewer columns most of
// what they keep would be zeros.
struct Rule {
  int64_t least_p, most_p, least_q, most_q;
};
constexpr Rule kLanesTaken{16, kWarp, 6, kLaneColumns}, kLanesPossible{1, kWarp, 1, kLaneColumns};

inline Path path_of(int64_t p, int64_t q, int64_t element_size, Choice choice) {
  const Rule& rule = choice == Choice::lanes ? kLanesPossible : kLanesTaken;
  const bool holds = rule.least_p <= p && p <= rule.most_p && rule.least_q <= q && q <= rule.most_q;
  return holds && choice != Choice::products && element_size == kLaneElement ? kLanes : kProducts;
}

inline int floor_log2(int64_t n) { return 63 - __builtin_clzll(static_cast<unsigned long long>(n)); }

struct Tiles {
  int side = 1, share = 0;
};

// Of a product of (rows, cols), each of whose elements is a sum of so many multiply-adds: the largest tiles that still
// occupy half of the threads, as a large tile reads shared memory less often for each multiply-add. Small ones are
// shared: by a power of two of threads, for each of which four multiply-adds and more are left.
inline Tiles tiles_of(int64_t rows, int64_t cols, int64_t length) {
  const auto count = [&](int side) { return ceil_div<int64_t>(rows, side) * ceil_div<int64_t>(cols, side); };
  if (count(4) >= kThreads / 2) return {4, 0};
  const auto share = [&](int64_t tiles) {
    if (tiles > kThreads || length < 8) return 0;
    return std::min({floor_log2(kThreads / tiles), floor_log2(length) - 2, kLog2Warp});
  };
  const int of_2 = share(count(2));
  if (count(2) << of_2 >= kThreads / 2) return {2, of_2};
  return {1, share(count(1))};
}

// The parts of an entry that follow from the sizes of its problem and the number of chunks, for each task.
inline void cut(Entry& entry, Path path, int64_t B, int64_t p, int64_t q, int64_t chunks) {
  entry.path = path;
  entry.by_chunks = Divisor(static_cast<uint32_t>(chunks));
  entry.by_p = SmallDivisor(static_cast<uint32_t>(p));
  entry.by_q = SmallDivisor(static_cast<uint32_t>(q));
  entry.p = static_cast<int16_t>(p);
  entry.q = static_cast<int16_t>(q);
  entry.rows = static_cast<int16_t>(B / chunks);
  entry.longer = static_cast<int32_t>(B % chunks);
  const int64_t n = ceil_div(B, chunks);
  const auto product = [&](Kind kind, int64_t rows, int64_t cols, int64_t length) {
    const Tiles tiles = tiles_of(rows, cols, length);
    entry.by_col_tiles[kind] = SmallDivisor(static_cast<uint32_t>(ceil_div<int64_t>(cols, tiles.side)));
    entry.side[kind] = static_cast<int8_t>(tiles.side);
    entry.share[kind] = static_cast<int8_t>(tiles.share);
  };
  product(kRight, n * p, q, q);
  product(kLeft, n * q, p, p);
  product(kSumR, p, p, n * q);
  product(kSumL, q, q, n * p);
}

}  // namespace detail

}  // namespace kfo::cuda
