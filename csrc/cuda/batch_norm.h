// Operands of the batch norm kernels and how rows are cut into chunks. No torch, no CUDA.
//
// Each order is two launches over the same blocks, one for each (task, group of channels, chunk of rows): sums over the
// chunk to the scratch memory; then every block adds its group's sums in the order of the chunks and does what is
// elementwise. A block per (task, group) would be one launch, but 16 blocks for 16 tasks of 32 channels. A third launch
// sums the gradients of parameters that all tasks share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../integers.h"
#include "table.h"

namespace kfo::cuda {

constexpr int kBatchNormColumns = 8;  // threads of a row: 128 bytes, 16 for each
constexpr int kBatchNormLanes = kThreads / kBatchNormColumns;
constexpr int kBatchNormSharedBytes = kBatchNormLanes * kBatchNormColumns * 16;  // of one sum over a block's rows

// Null: an absent cotangent, or an output that is not needed.
template <typename T>
struct BatchNormArguments {
  int64_t tasks, rows, channels, chunk_rows;
  int32_t groups, chunks;  // of channels, for each task; of rows, for each group
  int32_t launched;        // chunks of this launch: the first one alone where nothing is elementwise
  bool relu, vectors;      // vectors: whether 16 bytes at a time may be read and written
  T eps;
  const T *x, *dy, *ddx;
  const T *weight, *bias, *ddweight, *ddbias;
  int64_t weight_stride, bias_stride;  // 0: one row for all tasks
  const T *mean, *rstd;
  T *new_mean, *new_rstd, *y, *dx, *ddy;
  T *dweight, *dbias;  // (tasks, channels)
  T* partials;         // (tasks, groups, chunks, sums, group_channels)
};

template <typename T>
__host__ __device__ constexpr int group_channels() {
  return kBatchNormColumns * 16 / static_cast<int>(sizeof(T));
}

// Chunks depend on shapes alone, never on the GPU: so does the order of every sum. Returns the blocks of a launch.
template <typename T>
int64_t cut_batch_norm(BatchNormArguments<T>& args) {
  constexpr int64_t kBlocks = 528, kMostChunks = 128, kLeastRows = 2 * kBatchNormLanes;
  const int64_t groups = ceil_div<int64_t>(args.channels, group_channels<T>()), tiles = args.tasks * groups;
  int64_t chunks = tiles ? std::clamp<int64_t>(ceil_div(kBlocks, tiles), 1, kMostChunks) : 1;
  chunks = std::min(chunks, ceil_div(args.rows, kLeastRows));
  args.chunk_rows = ceil_div(args.rows, chunks);
  if (tiles * ceil_div(args.rows, args.chunk_rows) > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("x: " + std::to_string(args.tasks) + " tasks of " + std::to_string(args.channels) +
                                " channels need more thread blocks than a launch may have: make several calls");
  args.groups = static_cast<int32_t>(groups);
  args.chunks = args.launched = static_cast<int32_t>(ceil_div(args.rows, args.chunk_rows));
  return tiles * args.chunks;
}

// Sums over tasks of up to two (tasks, channels) arrays, for parameters that all tasks share.
template <typename T>
struct TaskSumArguments {
  int64_t tasks, channels;
  const T* from[2];
  T* to[2];
};

}  // namespace kfo::cuda
