// Operands of the convolution kernels and how their work is cut into blocks. No torch, no CUDA.
//
// conv2d and conv2d_input are one kernel: a product for each task, of gathered pixels (pixels, taps x channels) with
// the task's weights (taps x channels, result channels). With stride s the inputs are s x s phases, by their position
// modulo s: each phase sees taps of its own, s apart, and is a convolution of stride 1 of dy with them in reverse.
// conv2d_weight is the product (taps x channels, pixels) (pixels, out channels), its pixels split over blocks; a second
// launch adds their partial sums in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../conv2d.h"
#include "../integers.h"
#include "divisor.h"
#include "operand.h"
#include "table.h"

namespace kfo::cuda {

// A block computes tiles of kThreads rows (pixels, or taps x channels) and kConvColumns columns, a thread kConvRows x
// kThreadColumns of one; what it sums over passes by in slabs, two in shared memory.
constexpr int kConvColumns = 32, kConvRows = 8, kThreadColumns = 4;
constexpr int64_t kConvBlocks = 528;  // that a launch aims at: a constant, so that sums are the same on every GPU

template <typename T>
struct ConvTile {
  static constexpr int kWidth = 16 / static_cast<int>(sizeof(T));
  static constexpr int kDepth = 64 / static_cast<int>(sizeof(T));  // of a slab
  // Rows of shared memory, padded where neighbouring rows are read or written at once.
  static constexpr int kPixelPitch = kDepth + kWidth, kColumnPitch = kConvColumns + kWidth;
  static constexpr int kPixelSlab = kThreads * kPixelPitch, kColumnSlab = kDepth * kColumnPitch;  // elements
  static constexpr int64_t kTableBytes = kThreads * 24;                                           // of `GatherBlock`
  static constexpr int64_t kWeightTableBytes = 2 * kThreads * 16;                                 // of `WeightBlock`
};

// One axis: sizes of the images of x and of y, of the kernel.
struct ConvAxis {
  int32_t x, y, kernel, stride, padding;
};

// Along one axis of one phase: result first_to + i * to_step, i < count, is the sum over taps j of weight
// first_tap + j * tap_step times source first_from + i * from_step + j.
struct Phase {
  int32_t count, taps, first_from, from_step, first_to, to_step, first_tap, tap_step;

  __host__ __device__ Phase(const ConvAxis& a, bool input, int index) {
    if (!input) {
      count = a.y, taps = a.kernel;
      first_from = -a.padding, from_step = a.stride, first_to = 0, to_step = 1, first_tap = 0, tap_step = 1;
      return;
    }
    // Inputs index, index + stride, ...; the u-th pixel of dy sees them through tap `phase`, the one before through
    // phase + stride, and so on.
    const int phase = (index + a.padding) % a.stride, u = (index + a.padding) / a.stride;
    count = (a.x - 1 - index) / a.stride + 1;
    taps = phase < a.kernel ? (a.kernel - 1 - phase) / a.stride + 1 : 0;
    first_from = u - taps + 1, from_step = 1, first_to = index, to_step = a.stride;
    first_tap = phase + (taps - 1) * a.stride, tap_step = -a.stride;
  }
};

template <typename T>
struct GatherArguments {
  PackedRows<const T> from, weight;  // x or dy
  PackedRows<T> to;                  // y or dx
  ConvAxis rows, columns;
  int32_t images, from_channels, to_channels;
  int64_t weight_from, weight_to;  // from one channel of `from`, and of `to`, to the next
  Divisor by_from_channels;
  bool input;     // conv2d_input
  bool resident;  // the weights of a tile's columns stay in shared memory for all tiles of a block
  bool from_vectors, to_vectors;
  int32_t row_phases, column_phases;
  int32_t tiles;   // of pixels, for each block
  int32_t chunks;  // blocks for each (task, phase, tile of columns)
  int32_t column_tiles;
};

template <typename T>
struct WeightArguments {
  PackedRows<const T> x, dy;
  T* partials;  // (tasks, splits, kernel rows, kernel columns, C, whole tiles of O)
  PackedRows<T> dweight;
  ConvAxis rows, columns;
  int32_t images, C, O;
  bool x_vectors, dy_vectors;
  int32_t row_tiles, column_tiles, splits;
};

// A launch's blocks, and the bytes of shared memory of each.
struct ConvLaunch {
  int64_t blocks, shared_bytes;
};

// Kernels count in 32 bits what lies in one task; offsets of elements have 64.
inline void check_conv2d_counts(const Conv2dShape& s) {
  constexpr int64_t most = (int64_t{1} << 31) - 2 * kThreads, most_side = int64_t{1} << 30;
  const auto check = [](const char* what, double got, int64_t expected) {
    if (got > static_cast<double>(expected))
      throw std::invalid_argument(std::string("conv2d on CUDA: expected at most ") + std::to_string(expected) + " " +
                                  what + " for each task, got " + std::to_string(static_cast<int64_t>(got)));
  };
  const auto product = [](int64_t a, int64_t b, int64_t c) {
    return static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c);
  };
  check("rows or columns of padded images", static_cast<double>(std::max(s.H, s.W) + 2 * s.padding), most_side);
  check("pixels of x", product(s.N, s.H, s.W), most);
  check("pixels of y", product(s.N, s.Ho(), s.Wo()), most);
  check("weights of an out channel", product(s.KH, s.KW, s.C), most);
  check("weights of an in channel", product(s.KH, s.KW, s.O), most);
}

inline int64_t checked_blocks(int64_t a, int64_t b, int64_t c) {
  const double blocks = static_cast<double>(a) * static_cast<double>(b) * static_cast<double>(c);
  if (blocks >= 0x1p31) throw std::invalid_argument("conv2d on CUDA: expected fewer tasks or smaller images");
  return a * b * c;
}

inline ConvAxis row_axis(const Conv2dShape& s) {
  return {static_cast<int32_t>(s.H), static_cast<int32_t>(s.Ho()), static_cast<int32_t>(s.KH),
          static_cast<int32_t>(s.stride), static_cast<int32_t>(s.padding)};
}
inline ConvAxis column_axis(const Conv2dShape& s) {
  return {static_cast<int32_t>(s.W), static_cast<int32_t>(s.Wo()), static_cast<int32_t>(s.KW),
          static_cast<int32_t>(s.stride), static_cast<int32_t>(s.padding)};
}

// Fills in all but the operands' data and whether 16 bytes at a time may be read and written. A launch aims at `aim`
// blocks.
template <typename T>
ConvLaunch cut_gather(GatherArguments<T>& args, const Conv2dShape& s, int64_t tasks, bool input,
                      int64_t aim = kConvBlocks) {
  using Tile = ConvTile<T>;
  check_conv2d_counts(s);
  args.rows = row_axis(s), args.columns = column_axis(s), args.input = input;
  args.images = static_cast<int32_t>(s.N);
  args.from_channels = static_cast<int32_t>(input ? s.O : s.C);
  args.to_channels = static_cast<int32_t>(input ? s.C : s.O);
  args.by_from_channels = Divisor(static_cast<uint32_t>(args.from_channels));
  const int64_t taps = s.KH * s.KW;
  args.weight_from = input ? s.C * taps : taps, args.weight_to = input ? taps : s.C * taps;
  args.row_phases = static_cast<int32_t>(input ? std::min(s.H, s.stride) : 1);
  args.column_phases = static_cast<int32_t>(input ? std::min(s.W, s.stride) : 1);
  args.column_tiles = static_cast<int32_t>(ceil_div<int64_t>(args.to_channels, kConvColumns));

  // The first phase has the most pixels.
  const int64_t pixels = s.N * Phase(args.rows, input, 0).count * Phase(args.columns, input, 0).count;
  const int64_t tiles = ceil_div<int64_t>(pixels, kThreads);
  const int64_t parts = checked_blocks(tasks, int64_t{args.row_phases} * args.column_phases, args.column_tiles);
  args.tiles =
      static_cast<int32_t>(std::clamp<int64_t>(checked_blocks(parts, tiles, 1) / aim, 1, std::max<int64_t>(tiles, 1)));
  args.chunks = static_cast<int32_t>(ceil_div<int64_t>(tiles, args.tiles));

  const int64_t depth = ceil_div<int64_t>(taps * args.from_channels, Tile::kDepth);
  const auto shared_bytes = [](int64_t slabs) {
    return Tile::kTableBytes + static_cast<int64_t>(sizeof(T)) * (2 * Tile::kPixelSlab + slabs * Tile::kColumnSlab);
  };
  args.resident = args.tiles > 1 && shared_bytes(depth) <= kSharedBytes;
  return {parts * args.chunks, shared_bytes(args.resident ? depth : 2)};
}

// The same for conv2d_weight. No images are no splits: the second launch then writes zeros.
template <typename T>
ConvLaunch cut_weight(WeightArguments<T>& args, const Conv2dShape& s, int64_t tasks, int64_t aim = kConvBlocks) {
  using Tile = ConvTile<T>;
  constexpr int64_t kLeastPixels = 64, kMostPixels = 2048;  // of a split: rounding grows with the number of products
  check_conv2d_counts(s);
  args.rows = row_axis(s), args.columns = column_axis(s);
  args.images = static_cast<int32_t>(s.N), args.C = static_cast<int32_t>(s.C), args.O = static_cast<int32_t>(s.O);
  args.row_tiles = static_cast<int32_t>(ceil_div<int64_t>(s.KH * s.KW * s.C, kThreads));
  args.column_tiles = static_cast<int32_t>(ceil_div<int64_t>(s.O, kConvColumns));
  const int64_t tiles = checked_blocks(tasks, args.row_tiles, args.column_tiles), pixels = s.N * s.Ho() * s.Wo();
  int64_t splits = std::min(ceil_div(aim, std::max<int64_t>(tiles, 1)), ceil_div(pixels, kLeastPixels));
  splits = std::max(splits, ceil_div(pixels, kMostPixels));
  args.splits = static_cast<int32_t>(splits);
  return {checked_blocks(tiles, splits, 1),
          Tile::kWeightTableBytes + static_cast<int64_t>(sizeof(T)) * 2 * Tile::kDepth * (kThreads + kConvColumns)};
}

template <typename T>
int64_t partial_sums(const WeightArguments<T>& args, int64_t tasks) {
  return tasks * args.splits * args.rows.kernel * args.columns.kernel * args.C * args.column_tiles * kConvColumns;
}

// Blocks of the second launch: one for each kConvColumns x kConvColumns of a task's weights.
template <typename T>
int64_t weight_sum_blocks(const WeightArguments<T>& args, int64_t tasks) {
  const int64_t rows = int64_t{args.rows.kernel} * args.columns.kernel * args.C;
  return checked_blocks(tasks, ceil_div<int64_t>(rows, kConvColumns), args.column_tiles);
}

template <typename T>
constexpr int64_t weight_sum_shared_bytes() {
  return kConvColumns * (kConvColumns + 1) * static_cast<int64_t>(sizeof(T));
}

}  // namespace kfo::cuda
