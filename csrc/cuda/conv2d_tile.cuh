// What the convolution kernels share: pixels and taps, copies, and a thread's part of a tile.
#pragma once

#include "conv2d.h"
#include "staging.cuh"

namespace kfo::cuda {

// What the threads of a block compute of a tile: a warp 32 rows, its lanes 4 x 8 pieces of kConvRows x kThreadColumns.
struct ConvLane {
  int warp_row, row, column;  // the first of a warp; a lane's among the 4, and its first column

  __device__ __forceinline__ ConvLane() {
    const int thread = static_cast<int>(threadIdx.x);
    warp_row = thread / 32 * 32, row = thread % 32 / 8, column = thread % 8 * kThreadColumns;
  }
};

// A pixel of an image: where its first channel lies, in elements from the task's first, and its row and column, which
// may be outside of the image. Two numbers of one type, which are read at once.
struct alignas(16) Pixel {
  int64_t at;
  uint64_t place;

  __device__ __forceinline__ Pixel(int64_t at_, int row, int column)
      : at(at_), place(static_cast<uint64_t>(static_cast<uint32_t>(row)) << 32 | static_cast<uint32_t>(column)) {}
  __device__ __forceinline__ unsigned row() const { return static_cast<unsigned>(place >> 32); }
  __device__ __forceinline__ unsigned column() const { return static_cast<unsigned>(place); }
};
constexpr int32_t kOutside = INT32_MIN;  // a row that no tap moves into an image

// What one k = (tap, channel) adds to a pixel.
struct Tap {
  int64_t at;
  int row, column;
  bool exists;

  __device__ __forceinline__ bool sees(const Pixel& pixel, int rows, int columns) const {
    return exists & (pixel.row() + static_cast<unsigned>(row) < static_cast<unsigned>(rows)) &
           (pixel.column() + static_cast<unsigned>(column) < static_cast<unsigned>(columns));
  }
};

// An address that need not be one of an element: nothing is read there unless it is.
template <typename T>
__device__ __forceinline__ const T* address(const T* base, int64_t elements) {
  return reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(elements) * sizeof(T));
}

template <typename T>
__device__ __forceinline__ void read(T (&values)[kThreadColumns], const T* shared) {
#pragma unroll
  for (int v = 0; v < kThreadColumns; v += Vector<T>::kWidth) {
    const Vector<T> part = *reinterpret_cast<const Vector<T>*>(shared + v);
#pragma unroll
    for (int w = 0; w < Vector<T>::kWidth; ++w) values[v + w] = part.at[w];
  }
}

template <typename T>
__device__ __forceinline__ void multiply_add(T (&sum)[kConvRows][kThreadColumns], int u, T a,
                                             const T (&b)[kThreadColumns]) {
#pragma unroll
  for (int v = 0; v < kThreadColumns; ++v) sum[u][v] = fma(a, b[v], sum[u][v]);
}

// kThreadColumns values to global memory, of which `count` exist.
template <typename T>
__device__ __forceinline__ void write(T* to, const T (&values)[kThreadColumns], int count, bool vectors) {
  constexpr int width = Vector<T>::kWidth;
#pragma unroll
  for (int v = 0; v < kThreadColumns; v += width) {
    if (vectors) {
      Vector<T> part;
#pragma unroll
      for (int w = 0; w < width; ++w) part.at[w] = values[v + w];
      if (v < count) store_vector(to + v, part);
    } else {
#pragma unroll
      for (int w = 0; w < width; ++w)
        if (v + w < count) to[v + w] = values[v + w];
    }
  }
}

// Blocks of a multiprocessor at once, as far as registers go.
template <typename T>
constexpr int kConvResident = sizeof(T) == 4 ? 4 : 2;

}  // namespace kfo::cuda
