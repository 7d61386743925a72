// The two kernels of conv2d_weight: see conv2d.h for the product and how it is cut. Slabs of pixels pass through shared
// memory as in conv2d_gather.cuh; the partial sums of the splits are added in a fixed order.
#pragma once

#include "../integers.h"
#include "conv2d_tile.cuh"

namespace kfo::cuda {

// A block of conv2d_weight: one split of a task's pixels, for kThreads of (tap, channel) and kConvColumns of O.
template <typename T>
class WeightBlock {
  using Tile = ConvTile<T>;
  static constexpr int kWidth = Tile::kWidth, kDepth = Tile::kDepth;

 public:
  __device__ __forceinline__ explicit WeightBlock(const WeightArguments<T>& args) : args_(args) {
    int block = static_cast<int>(blockIdx.x);
    first_row_ = block % args.row_tiles * kThreads;
    block /= args.row_tiles;
    first_column_ = block % args.column_tiles * kConvColumns;
    block /= args.column_tiles;
    const int64_t split = block % args.splits, task = block / args.splits;
    const int64_t pixels = int64_t{args.images} * args.rows.y * args.columns.y;
    begin_ = static_cast<int>(pixels * split / args.splits);
    count_ = static_cast<int>(pixels * (split + 1) / args.splits) - begin_;
    size_ = args.rows.kernel * args.columns.kernel * args.C;
    x_ = args.x.data + task * args.x.stride;
    dy_ = args.dy.data + task * args.dy.stride + int64_t{begin_} * args.O;
    const int64_t row_size = int64_t{args.column_tiles} * kConvColumns;
    to_ = args.partials + ((task * args.splits + split) * size_ + first_row_) * row_size + first_column_;
  }

  __device__ __forceinline__ void run() const {
    if (args_.x_vectors)
      run<kWidth>();
    else
      run<1>();
  }

 private:
  const WeightArguments<T>& args_;
  int first_row_, first_column_, size_, begin_, count_;  // size: kernel rows x kernel columns x C
  const T *x_, *dy_;
  T* to_;

  // Of kThreads pixels at a time, those before and those after are kept.
  __device__ __forceinline__ static Pixel& source(int index) { return shared_array<Pixel>()[index % (2 * kThreads)]; }
  __device__ __forceinline__ static T* x_slab(int slab) {
    return reinterpret_cast<T*>(shared_array<Pixel>() + 2 * kThreads) + (slab & 1) * kDepth * kThreads;
  }
  __device__ __forceinline__ static T* dy_slab(int slab) {
    return x_slab(0) + (2 * kThreads + (slab & 1) * kConvColumns) * kDepth;
  }

  __device__ __forceinline__ void locate(int first) const {
    const ConvAxis &h = args_.rows, &w = args_.columns;
    const int offset = first + static_cast<int>(threadIdx.x), index = begin_ + offset;
    Pixel pixel(0, kOutside, 0);
    if (offset < count_) {
      const int line = index / w.y, image = line / h.y;
      const int row = line % h.y * h.stride - h.padding, column = index % w.y * w.stride - w.padding;
      pixel = {((int64_t{image} * h.x + row) * w.x + column) * args_.C, row, column};
    }
    source(offset) = pixel;
  }

  __device__ __forceinline__ Tap tap_of(int k) const {
    const int tap = k / args_.C, row = tap / args_.columns.kernel, column = tap % args_.columns.kernel;
    return {(int64_t{row} * args_.columns.x + column) * args_.C + k % args_.C, row, column, k < size_};
  }

  template <int kElements>
  __device__ __forceinline__ void copy_x(int slab, const Tap& tap) const {
    constexpr int across = kThreads / kElements;
    const int thread = static_cast<int>(threadIdx.x), along = thread % across * kElements;
#pragma unroll 4
    for (int i = 0; i < kDepth * across / kThreads; ++i) {
      const int p = thread / across + i * (kThreads / across);
      const Pixel pixel = source(slab * kDepth + p);
      copy_or_zero<kElements * sizeof(T)>(x_slab(slab) + p * kThreads + along, address(x_, pixel.at + tap.at),
                                          tap.sees(pixel, args_.rows.x, args_.columns.x));
    }
  }

  template <int kElements>
  __device__ __forceinline__ void copy_dy(int slab) const {
    constexpr int across = kConvColumns / kElements, step = kThreads / across;
    const int thread = static_cast<int>(threadIdx.x), along = thread % across * kElements, first = thread / across;
    const int pixel = slab * kDepth + first, column = first_column_ + along;
    const T* from = address(dy_, int64_t{pixel} * args_.O + column);
    T* to = dy_slab(slab) + first * kConvColumns + along;
    // Of these columns, the pixels that exist.
    const int left = column < args_.O ? count_ - pixel : 0;
#pragma unroll 4
    for (int p = 0; p < kDepth; p += step)
      copy_or_zero<kElements * sizeof(T)>(to + p * kConvColumns, address(from, int64_t{p} * args_.O), p < left);
  }

  template <int kElements>
  __device__ __forceinline__ void copy(int slab, const Tap& tap) const {
    if (slab * kDepth >= count_) return;
    copy_x<kElements>(slab, tap);
    if (args_.dy_vectors)
      copy_dy<kWidth>(slab);
    else
      copy_dy<1>(slab);
    __pipeline_commit();
  }

  // A lane's rows lie in two groups of 4, so that 16 bytes at a time may be read and no two lanes share a bank.
  __device__ __forceinline__ static int row_of(const ConvLane& lane, int u) {
    return lane.warp_row + u / 4 * 16 + lane.row * 4 + u % 4;
  }

  __device__ __forceinline__ static void multiply(T (&sum)[kConvRows][kThreadColumns], int slab, const ConvLane& lane) {
#pragma unroll(kDepth / 2)
    for (int k = 0; k < kDepth; ++k) {
      T x[2][4], y[kThreadColumns];
      read(y, dy_slab(slab) + k * kConvColumns + lane.column);
#pragma unroll
      for (int half = 0; half < 2; ++half) read(x[half], x_slab(slab) + k * kThreads + row_of(lane, half * 4));
#pragma unroll
      for (int u = 0; u < kConvRows; ++u) multiply_add(sum, u, x[u / 4][u % 4], y);
    }
  }

  template <int kElements>
  __device__ __forceinline__ void run() const {
    const ConvLane lane;
    const int rows = min(kThreads, size_ - first_row_);
    const Tap tap = tap_of(first_row_ + static_cast<int>(threadIdx.x) % (kThreads / kElements) * kElements);
    T sum[kConvRows][kThreadColumns] = {};
    locate(0);
    __syncthreads();
    copy<kElements>(0, tap);
#pragma unroll 1
    for (int slab = 0; slab * kDepth < count_; ++slab) {
      __pipeline_wait_prior(0);
      __syncthreads();
      copy<kElements>(slab + 1, tap);
      // Read from the next slab on.
      if ((slab + 2) * kDepth % kThreads == 0) locate((slab + 2) * kDepth);
      if (lane.warp_row < rows) multiply(sum, slab, lane);
    }
    const int row_size = args_.column_tiles * kConvColumns;
#pragma unroll
    for (int u = 0; u < kConvRows; ++u) {
      const int row = row_of(lane, u);
      if (row < rows) write(to_ + int64_t{row} * row_size + lane.column, sum[u], kThreadColumns, true);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kConvResident<T>)
    convolution_weight_kernel(const __grid_constant__ WeightArguments<T> args) {
  WeightBlock<T>(args).run();
}

// kConvColumns (channel, tap) of a task's weights for as many out channels: read along the latter, written along the
// former.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    convolution_weight_sum_kernel(const __grid_constant__ WeightArguments<T> args) {
  constexpr int pitch = kConvColumns + 1, lines = kThreads / kConvColumns;
  const int taps = args.rows.kernel * args.columns.kernel, size = taps * args.C;
  const int across = static_cast<int>(threadIdx.x) % kConvColumns, line = static_cast<int>(threadIdx.x) / kConvColumns;
  int block = static_cast<int>(blockIdx.x);
  const int tiles = ceil_div(size, kConvColumns), first = block % tiles * kConvColumns;
  block /= tiles;
  const int first_column = block % args.column_tiles * kConvColumns;
  const int64_t task = block / args.column_tiles, row_size = int64_t{args.column_tiles} * kConvColumns;

  for (int i = line; i < kConvColumns && first + i < size; i += lines) {
    const int row = (first + i) % taps * args.C + (first + i) / taps;
    const T* from = args.partials + (task * args.splits * size + row) * row_size + first_column + across;
    double sum = 0;  // so that its error does not grow with the number of splits
#pragma unroll 4
    for (int split = 0; split < args.splits; ++split) sum += from[split * (size * row_size)];
    shared_array<T>()[i * pitch + across] = static_cast<T>(sum);
  }
  __syncthreads();
  if (first + across >= size) return;
  T* to = args.dweight.data + task * args.dweight.stride + first + across;
  for (int i = line; i < kConvColumns && first_column + i < args.O; i += lines)
    to[int64_t{first_column + i} * size] = shared_array<T>()[across * pitch + i];
}

}  // namespace kfo::cuda
