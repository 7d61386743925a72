// The kernel of conv2d and conv2d_input: see conv2d.h for the product and how it is cut. Operands come to shared memory
// by asynchronous copies, a slab while the one before is multiplied; every sum runs in one fixed order.
#pragma once

#include "conv2d_tile.cuh"

namespace kfo::cuda {

// A block of conv2d or conv2d_input: tiles of pixels of one task, phase and kConvColumns of the result's channels.
template <typename T>
class GatherBlock {
  using Tile = ConvTile<T>;
  static constexpr int kWidth = Tile::kWidth, kDepth = Tile::kDepth;

 public:
  __device__ __forceinline__ explicit GatherBlock(const GatherArguments<T>& args)
      : GatherBlock(args, static_cast<int>(blockIdx.x) / args.chunks) {}

  __device__ __forceinline__ void run() {
    const int chunk = static_cast<int>(blockIdx.x) % args_.chunks;
    for (int tile = 0; tile < args_.tiles; ++tile) {
      const int64_t first = (int64_t{chunk} * args_.tiles + tile) * kThreads;
      if (first >= pixels_) break;
      locate(static_cast<int>(first));
      __syncthreads();
      run_tile(min(kThreads, pixels_ - static_cast<int>(first)), tile == 0 || !args_.resident);
      __syncthreads();  // the next tile writes the tables
    }
  }

 private:
  const GatherArguments<T>& args_;
  Phase rows_, columns_;
  Divisor by_tap_columns_;
  int pixels_, depth_, first_column_;  // pixels of the task's phase; k of a sum
  const T *from_, *weight_;
  T* to_;

  // part: the number of this block's (task, row phase, column phase, tile of columns).
  __device__ __forceinline__ GatherBlock(const GatherArguments<T>& args, int part)
      : args_(args),
        rows_(args.rows, args.input, part / args.column_tiles / args.column_phases % args.row_phases),
        columns_(args.columns, args.input, part / args.column_tiles % args.column_phases),
        by_tap_columns_(columns_.taps ? columns_.taps : 1) {
    const int64_t task = part / args.column_tiles / args.column_phases / args.row_phases;
    pixels_ = args.images * rows_.count * columns_.count;
    depth_ = rows_.taps * columns_.taps * args.from_channels;
    first_column_ = part % args.column_tiles * kConvColumns;
    from_ = args.from.data + task * args.from.stride;
    weight_ = args.weight.data + task * args.weight.stride;
    to_ = args.to.data + task * args.to.stride;
  }

  // The tables of a tile's pixels: where the first tap reads, and where the result goes.
  __device__ __forceinline__ static Pixel* sources() { return shared_array<Pixel>(); }
  __device__ __forceinline__ static int64_t* targets() { return reinterpret_cast<int64_t*>(sources() + kThreads); }
  __device__ __forceinline__ static T* pixel_slab(int slab) {
    return reinterpret_cast<T*>(targets() + kThreads) + (slab & 1) * Tile::kPixelSlab;
  }
  __device__ __forceinline__ T* weight_slab(int slab) const {
    return pixel_slab(0) + 2 * Tile::kPixelSlab + (args_.resident ? slab : slab & 1) * Tile::kColumnSlab;
  }

  __device__ __forceinline__ int source_rows() const { return args_.input ? args_.rows.y : args_.rows.x; }
  __device__ __forceinline__ int source_columns() const { return args_.input ? args_.columns.y : args_.columns.x; }
  __device__ __forceinline__ Pixel pixel_of(int image, int row, int column) const {
    return {((int64_t{image} * source_rows() + row) * source_columns() + column) * args_.from_channels, row, column};
  }

  __device__ __forceinline__ void locate(int first) const {
    const int thread = static_cast<int>(threadIdx.x), index = first + thread;
    Pixel source(0, kOutside, 0);
    if (index < pixels_) {
      const int line = index / columns_.count, i = index % columns_.count;
      const int image = line / rows_.count, j = line % rows_.count;
      source = pixel_of(image, rows_.first_from + j * rows_.from_step, columns_.first_from + i * columns_.from_step);
      targets()[thread] =
          ((int64_t{image} * (args_.input ? args_.rows.x : args_.rows.y) + rows_.first_to + j * rows_.to_step) *
               (args_.input ? args_.columns.x : args_.columns.y) +
           columns_.first_to + i * columns_.to_step) *
          args_.to_channels;
    }
    sources()[thread] = source;
  }

  // k runs over taps, in each over channels.
  __device__ __forceinline__ void split(int k, int& row, int& column, int& channel) const {
    const int tap = args_.by_from_channels.quotient(k);
    channel = k - tap * args_.from_channels;
    row = by_tap_columns_.quotient(tap);
    column = tap - row * columns_.taps;
  }

  template <int kElements>
  __device__ __forceinline__ void copy_pixels(int slab) const {
    constexpr int across = kDepth / kElements;
    const int thread = static_cast<int>(threadIdx.x), along = thread % across * kElements;
    int row, column, channel;
    split(slab * kDepth + along, row, column, channel);
    const Tap tap{(int64_t{row} * source_columns() + column) * args_.from_channels + channel, row, column,
                  slab * kDepth + along < depth_};
    const T* from = address(from_, tap.at);
#pragma unroll 4
    for (int i = 0; i < across; ++i) {
      const int p = thread / across + i * (kThreads / across);
      const Pixel pixel = sources()[p];
      copy_or_zero<kElements * sizeof(T)>(pixel_slab(slab) + p * Tile::kPixelPitch + along, address(from, pixel.at),
                                          tap.sees(pixel, source_rows(), source_columns()));
    }
  }

  // Neighbouring threads take what lies close together in memory: some k of one column, or a few columns each.
  __device__ __forceinline__ void copy_weights(int slab) const {
    constexpr int step = kThreads / kDepth;  // columns at once
    const int thread = static_cast<int>(threadIdx.x);
    const int along = args_.input ? thread / step : thread % kDepth;
    int row, column, channel;
    split(slab * kDepth + along, row, column, channel);
    const int64_t kernel_row = rows_.first_tap + int64_t{row} * rows_.tap_step;
    const int64_t kernel_column = columns_.first_tap + int64_t{column} * columns_.tap_step;
    const int first = args_.input ? thread % step : thread / kDepth;
    const T* from = address(weight_, channel * args_.weight_from + kernel_row * args_.columns.kernel + kernel_column +
                                         (first_column_ + first) * args_.weight_to);
    T* to = weight_slab(slab) + along * Tile::kColumnPitch + first;
    // Of this k, the columns that exist.
    const int left = slab * kDepth + along < depth_ ? args_.to_channels - first_column_ - first : 0;
#pragma unroll
    for (int n = 0; n < kConvColumns; n += step)
      copy_or_zero<sizeof(T)>(to + n, address(from, n * args_.weight_to), n < left);
  }

  __device__ __forceinline__ void copy(int slab, bool weights) const {
    if (slab * kDepth >= depth_) return;
    if (args_.from_vectors)
      copy_pixels<kWidth>(slab);
    else
      copy_pixels<1>(slab);
    if (weights) copy_weights(slab);
    __pipeline_commit();
  }

  __device__ __forceinline__ void multiply(T (&sum)[kConvRows][kThreadColumns], int slab, const ConvLane& lane) const {
    const T* a = pixel_slab(slab) + (lane.warp_row + lane.row) * Tile::kPixelPitch;
    const T* b = weight_slab(slab) + lane.column;
#pragma unroll 2
    for (int k = 0; k < kDepth; k += kWidth) {
      Vector<T> x[kConvRows];
#pragma unroll
      for (int u = 0; u < kConvRows; ++u) x[u] = *reinterpret_cast<const Vector<T>*>(a + u * 4 * Tile::kPixelPitch + k);
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        T y[kThreadColumns];
        read(y, b + (k + w) * Tile::kColumnPitch);
#pragma unroll
        for (int u = 0; u < kConvRows; ++u) multiply_add(sum, u, x[u].at[w], y);
      }
    }
  }

  __device__ __forceinline__ void run_tile(int rows, bool weights) const {
    const ConvLane lane;
    T sum[kConvRows][kThreadColumns] = {};
    copy(0, weights);
#pragma unroll 1
    for (int slab = 0; slab * kDepth < depth_; ++slab) {
      __pipeline_wait_prior(0);
      __syncthreads();
      copy(slab + 1, weights);
      if (lane.warp_row < rows) multiply(sum, slab, lane);
    }
    const int column = first_column_ + lane.column;
#pragma unroll
    for (int u = 0; u < kConvRows; ++u) {
      const int row = lane.warp_row + u * 4 + lane.row;
      if (row < rows) write(to_ + targets()[row] + column, sum[u], args_.to_channels - column, args_.to_vectors);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kConvResident<T>)
    convolution_kernel(const __grid_constant__ GatherArguments<T> args) {
  GatherBlock<T>(args).run();
}

}  // namespace kfo::cuda
