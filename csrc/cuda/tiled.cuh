// One tile of one product for each thread block: slabs of both operands pass through shared memory.
#pragma once

#include "../integers.h"
#include "staging.cuh"
#include "tiled.h"

namespace kfo::cuda {

// Walks over the slabs of a tile's sum in their one order: tasks, then b, then terms, then depth.
struct Slab {
  const TiledProduct& product;
  int64_t task, last_task, b, last_b;
  bool second;  // whether at the second term
  int32_t k;

  __device__ __forceinline__ const TiledTerm& term() const { return second ? product.Y : product.X; }
  __device__ __forceinline__ bool done() const { return task == last_task; }

  __device__ __forceinline__ void advance(int depth) {
    k += depth;
    if (k < term().depth) return;
    k = 0;
    if (!second && product.Y.depth) {
      second = true;
      return;
    }
    second = false;
    if (++b < last_b) return;
    b = 0;  // a product that is no sum has one b and one task, and is done
    ++task;
  }
};

template <TileShape kShape, int kRows, int kCols, typename T>
class Tile {
  static constexpr int kTileRows = tile_size(kShape).rows, kTileCols = tile_size(kShape).cols;
  static constexpr int kDepth = tile_size(kShape).depth;
  static constexpr int kRowStep = kTileRows / kRows, kColStep = kTileCols / kCols;
  static_assert(kRowStep * kColStep == kThreads, "one thread for each kRows x kCols of the tile");
  static constexpr int kA = kTileRows * kDepth / kThreads, kB = kTileCols * kDepth / kThreads;

 public:
  static constexpr int kPitchA = kTileRows + 1, kPitchB = kTileCols + 1;  // odd: no two k share a bank
  static_assert(kDepth * (kPitchA + kPitchB) <= kTiledShared, "both slabs fit");

  // first_row, first_col: of the tile, in the product.
  static __device__ __forceinline__ void run(const Data<T>& data, Slab slab, int first_row, int first_col, T* out,
                                             const T* bias) {
    const TiledProduct& product = slab.product;
    T* shared_A = shared_array<T>();
    T* shared_B = shared_A + kDepth * kPitchA;
    const int row = threadIdx.x / kColStep, col = threadIdx.x % kColStep;
    T sum[kRows][kCols] = {};
    T a[kA], b[kB];

    load_slab(a, b, data, slab, first_row, first_col);
    while (!slab.done()) {
      store<kTileRows, kPitchA>(shared_A, a, slab.term().A.col == 1);
      store<kTileCols, kPitchB>(shared_B, b, slab.term().B.row == 1);
      __syncthreads();
      slab.advance(kDepth);
      load_slab(a, b, data, slab, first_row, first_col);  // on its way while this one is multiplied
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        T x[kRows], y[kCols];
#pragma unroll
        for (int u = 0; u < kRows; ++u) x[u] = shared_A[k * kPitchA + row + u * kRowStep];
#pragma unroll
        for (int v = 0; v < kCols; ++v) y[v] = shared_B[k * kPitchB + col + v * kColStep];
#pragma unroll
        for (int u = 0; u < kRows; ++u)
#pragma unroll
          for (int v = 0; v < kCols; ++v) sum[u][v] = fma(x[u], y[v], sum[u][v]);
      }
      __syncthreads();
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u)
#pragma unroll
      for (int v = 0; v < kCols; ++v) {
        const int64_t i = first_row + row + u * kRowStep, j = first_col + col + v * kColStep;
        if (i >= product.rows || j >= product.cols) continue;
        const int64_t e = i * product.cols + j;
        out[e] = bias ? sum[u][v] + bias[e] : sum[u][v];
      }
  }

 private:
  // Element e of a slab of kSize x kDepth: k runs fastest where it is contiguous in memory.
  template <int kSize>
  static __device__ __forceinline__ void locate(int e, bool along_k, int& index, int& k) {
    index = along_k ? e / kDepth : e % kSize;
    k = along_k ? e % kDepth : e / kSize;
  }

  template <int kSize, int kCount>
  static __device__ __forceinline__ void load(T (&values)[kCount], const Data<T>& data, const TiledMatrix& matrix,
                                              const Slab& slab, int first, int size, int depth) {
    const PackedRows<const T>& source = data[matrix.source];
    const T* from = source.data + slab.task * source.stride + matrix.offset + slab.b * matrix.batch;
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      int index, k;
      locate<kSize>(threadIdx.x + c * kThreads, matrix.col == 1, index, k);
      index += first;
      k += slab.k;
      values[c] = index < size && k < depth ? from[int64_t{index} * matrix.row + int64_t{k} * matrix.col] : T(0);
    }
  }

  // The threads' shares of the next slab, if there is one. B is read as its transpose: rows and columns change places.
  static __device__ __forceinline__ void load_slab(T (&a)[kA], T (&b)[kB], const Data<T>& data, const Slab& slab,
                                                   int first_row, int first_col) {
    if (slab.done()) return;
    const TiledTerm& term = slab.term();
    const TiledMatrix B{term.B.source, term.B.col, term.B.row, term.B.offset, term.B.batch};
    load<kTileRows>(a, data, term.A, slab, first_row, slab.product.rows, term.depth);
    load<kTileCols>(b, data, B, slab, first_col, slab.product.cols, term.depth);
  }

  template <int kSize, int kPitch, int kCount>
  static __device__ __forceinline__ void store(T* shared, const T (&values)[kCount], bool along_k) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) {
      int index, k;
      locate<kSize>(threadIdx.x + c * kThreads, along_k, index, k);
      shared[k * kPitch + index] = values[c];
    }
  }
};

template <typename T>
using SquareTile = Tile<TileShape::square, 8, 4, T>;
template <typename T>
using WideTile = Tile<TileShape::wide, 8, 1, T>;
template <typename T>
using TallTile = Tile<TileShape::tall, 1, 8, T>;

template <typename T>
__global__ void __launch_bounds__(kThreads) tiled_kernel(const __grid_constant__ Arguments<T, TiledTable> args) {
  int index = 0;
  while (index + 1 < args.table.count && static_cast<int32_t>(blockIdx.x) >= args.table.products[index + 1].first_block)
    ++index;
  const TiledProduct& product = args.table.products[index];
  const TileSize size = tile_size(product.shape);
  const int64_t row_tiles = ceil_div(product.rows, size.rows);
  const int64_t col_tiles = ceil_div(product.cols, size.cols);
  const int64_t block = static_cast<int64_t>(blockIdx.x) - product.first_block;
  const int64_t tile = block % (row_tiles * col_tiles), batch = block / (row_tiles * col_tiles);
  const int first_row = static_cast<int>(tile / col_tiles * size.rows);
  const int first_col = static_cast<int>(tile % col_tiles * size.cols);

  // A sum runs over every b, and over every task where its output has one row.
  const int64_t task = product.sum ? batch : batch / product.B, b = product.sum ? 0 : batch % product.B;
  const int64_t all = product.sum && product.output_rows == 1 ? args.table.tasks : 1;
  const int64_t tasks = product.X.depth ? all : 0;
  const Slab slab{product, task, task + tasks, b, product.sum ? product.B : b + 1, false, 0};
  const PackedRows<T>& target = args.data[product.target];
  T* out = target.data + task * target.stride + product.offset + b * product.batch;
  const PackedRows<const T>& terms = args.data[kBias];
  const T* bias = product.bias < 0 || !terms.data ? nullptr : terms.data + task * terms.stride + product.bias;

  switch (product.shape) {
    case TileShape::square:
      return SquareTile<T>::run(args.data, slab, first_row, first_col, out, bias);
    case TileShape::wide:
      return WideTile<T>::run(args.data, slab, first_row, first_col, out, bias);
    case TileShape::tall:
      return TallTile<T>::run(args.data, slab, first_row, first_col, out, bias);
  }
}

}  // namespace kfo::cuda
