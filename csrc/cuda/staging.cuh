// Shared memory, and copies between packed global memory and its rows of odd length, 16 bytes at a time where the rows
// have no gap.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>

#include "table.h"

namespace kfo::cuda {

// The dynamic shared memory of the launch.
template <typename T>
__device__ __forceinline__ T* shared_array() {
  extern __shared__ __align__(16) unsigned char shared_memory[];
  return reinterpret_cast<T*>(shared_memory);
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T at[kWidth];
};

// One store each, by intrinsic: for sm_80 and sm_90 the compiler takes an assignment apart, element by element.
__device__ __forceinline__ void store_vector(float* to, const Vector<float>& v) {
  __stwb(reinterpret_cast<float4*>(to), float4{v.at[0], v.at[1], v.at[2], v.at[3]});
}
__device__ __forceinline__ void store_vector(double* to, const Vector<double>& v) {
  __stwb(reinterpret_cast<double2*>(to), double2{v.at[0], v.at[1]});
}

// An asynchronous copy of kBytes bytes, or zeros if it is not wanted: then nothing is read. The intrinsic only takes a
// constant number of zeros, which would cost a branch for each copy.
template <int kBytes>
__device__ __forceinline__ void copy_or_zero(void* to, const void* from, bool wanted) {
#ifdef __CUDA_ARCH__
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = wanted ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(from), "r"(bytes), "n"(kBytes)
                 : "memory");
#else
  __pipeline_memcpy_async(to, from, kBytes, wanted ? 0 : kBytes);
#endif
}

// Elements from the last 16-byte boundary to `data`.
template <typename T>
__device__ __forceinline__ int misalignment(const T* data) {
  return reinterpret_cast<uintptr_t>(data) / sizeof(T) % Vector<T>::kWidth;
}

// How many of `size` elements at `data` come before the first 16-byte boundary.
template <typename T>
__device__ __forceinline__ int head_of(const T* data, int size) {
  return min(size, (Vector<T>::kWidth - misalignment(data)) % Vector<T>::kWidth);
}

// Where element e of packed (rows, cols) lies in shared memory: pitch_of(cols) is cols or cols + 1.
__device__ __forceinline__ int shared_index(int e, int cols, SmallDivisor by_cols) {
  return pitch_of(cols) == cols ? e : e + by_cols.quotient(e);
}

// (rows, cols) from global memory, packed, to shared memory of the same misalignment. Nobody waits here: all operands
// are on their way at once, complete after a commit, a wait for it, and a barrier.
template <typename T>
__device__ __forceinline__ void stage(T* shared, const T* from, int rows, int cols, SmallDivisor by_cols) {
  constexpr int width = Vector<T>::kWidth;
  const int size = rows * cols, first = threadIdx.x;
  if (pitch_of(cols) != cols) {
#pragma unroll 1
    for (int e = first; e < size; e += kThreads)
      __pipeline_memcpy_async(shared + e + by_cols.quotient(e), from + e, sizeof(T));
    return;
  }
  const int head = head_of(from, size), vectors = (size - head) / width;
#pragma unroll 1
  for (int v = first; v < vectors; v += kThreads)
    __pipeline_memcpy_async(shared + head + v * width, from + head + v * width, sizeof(Vector<T>));
  for (int rest = first; rest < size - vectors * width; rest += kThreads) {
    const int e = rest < head ? rest : rest + vectors * width;
    __pipeline_memcpy_async(shared + e, from + e, sizeof(T));
  }
}

// (rows, cols) from shared memory to global memory, packed.
template <typename T>
__device__ __forceinline__ void unstage(T* to, const T* shared, int rows, int cols, SmallDivisor by_cols) {
  constexpr int width = Vector<T>::kWidth;
  const int size = rows * cols;
  const int head = pitch_of(cols) == cols ? head_of(to, size) : size, vectors = (size - head) / width;
#pragma unroll 1
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    const int e = head + v * width;
    Vector<T> values;
#pragma unroll
    for (int w = 0; w < width; ++w) values.at[w] = shared[e + w];
    *reinterpret_cast<Vector<T>*>(to + e) = values;
  }
#pragma unroll 1
  for (int rest = threadIdx.x; rest < size - vectors * width; rest += kThreads) {
    const int e = rest < head ? rest : rest + vectors * width;
    to[e] = shared[shared_index(e, cols, by_cols)];
  }
}

}  // namespace kfo::cuda
