// What travels by value with a launch: the problems, where their work and results lie, and the constants that host and
// device agree on. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "divisor.h"
#include "operand.h"

namespace kfo::cuda {

constexpr int kThreads = 128;
constexpr int kLog2Warp = 5;
constexpr int kWarp = 1 << kLog2Warp, kWarps = kThreads / kWarp;
// Shared memory of a thread block. Every supported GPU grants 96 KB on request (compute capability 12.0 the least: 99),
// and with half of that two blocks and more fit on one multiprocessor.
constexpr int64_t kSharedBytes = 96 * 1024;
constexpr int64_t kPreferredSharedBytes = 48 * 1024;
constexpr int64_t kParameterBytes = 4096;  // of one launch
constexpr int kTableProblems = 30;
constexpr int kJobs = 8;                // of a block, at most
constexpr int kJobBytes = kJobs * 160;  // where they lie, at the start of its shared memory

// A block of the sum kernel sums so many elements; each of its slices adds every kSumSlices-th partial.
constexpr int kSumColumns = 32;
constexpr int kSumSlices = kThreads / kSumColumns;

// A matrix in shared memory has rows of odd length: neighbouring rows then start in different banks.
__host__ __device__ constexpr int pitch_of(int64_t columns) { return static_cast<int>(columns | 1); }

// How a block computes: products of all its threads, or a warp for each matrix, of at most kWarp rows and kLaneColumns
// columns of elements of kLaneElement bytes. Registers hold rows of no more.
enum Path : int8_t { kProducts, kLanes };
constexpr int kLaneColumns = 9, kLaneElement = 4;

// Rows of so many columns for a warp: whole 16-byte vectors, an odd number of them, so that neighbouring rows start in
// different banks.
__host__ __device__ constexpr int lane_pitch(int columns, int element_size) {
  const int width = 16 / element_size;
  return ((columns + width - 1) / width | 1) * width;
}

// Elements that a staged (rows, cols) takes: whole 16-byte vectors, and room to lie as far off a 16-byte boundary as
// its source does.
__host__ __device__ constexpr int padded_size(int64_t rows, int64_t cols, int64_t element_size) {
  const int64_t width = 16 / element_size, size = rows * pitch_of(cols);
  return static_cast<int>((size + 2 * width - 2) / width * width);
}

// Which of M = R dY, S = ddR dY, N = G L and K = ddG L + G ddL the double backward needs, given the outputs that are
// needed and the cotangents that are there.
struct Intermediates {
  bool M, S, N, K;

  __host__ __device__ constexpr Intermediates(bool need_R, bool need_G, bool need_L, bool need_Y, bool has_R,
                                              bool has_G, bool has_L)
      : M((need_G && has_L) || (need_L && has_G)),
        S((need_G || need_L) && has_R),
        N(need_Y && has_R),
        K((need_R || need_Y) && (has_G || has_L)) {}
};

// A block's products by what is constant in their sizes: (n p, q), (n q, p), (p, p) and (q, q) for n matrices.
enum Kind : int8_t { kRight, kLeft, kSumR, kSumL, kKinds };

// One problem whose factors fit in shared memory. Its blocks, one per (task, chunk of B), are numbered by task, then by
// chunk. The first `longer` chunks have one matrix more than `rows`.
struct Entry {
  int64_t R, G, L, bias;  // offsets into one packed row
  int64_t partials;       // scratch offset of the first block's partial dR (p, p), then dL (q, q)
  Divisor by_chunks;      // of B, for each task
  Divisor by_sum_blocks;  // for each row of dR and dL, in the launch that sums the partial ones
  SmallDivisor by_p, by_q;
  int32_t longer;
  int16_t p, q, rows;
  // How the threads share a product: each takes a tile of side x side, or 2^share threads take one together.
  SmallDivisor by_col_tiles[kKinds];
  int8_t side[kKinds], share[kKinds];
  Path path;

  __host__ __device__ int32_t chunks() const { return static_cast<int32_t>(by_chunks.by); }
};

struct Table {
  Entry entries[kTableProblems];
  // The first block of each entry in the launch of the order's kernel, and in that of the sums; behind them the largest
  // number.
  int32_t first_block[kTableProblems], first_sum_block[kTableProblems];
  int64_t tasks;
  // Rows of the outputs dR and dL: 0 where there is nothing to compute, 1 where the factor is shared by all tasks.
  int64_t dR_rows, dL_rows;
  int32_t count;

  // Elements of one block's partial sums.
  __host__ __device__ int64_t partials_size(const Entry& entry) const {
    return (dR_rows ? int64_t{entry.p} * entry.p : 0) + (dL_rows ? int64_t{entry.q} * entry.q : 0);
  }

  // Whether one block computes the whole sum of an output with so many rows: then it writes the output itself.
  __host__ __device__ bool is_complete(const Entry& entry, int64_t output_rows) const {
    return entry.chunks() == 1 && output_rows == tasks;
  }
};

}  // namespace kfo::cuda
