// Packed operands and outputs as the kernels see them. No torch, no CUDA.
#pragma once

#include <cstdint>

#if !defined(__CUDACC__) && !defined(__host__)
#define __host__
#define __device__
#endif

namespace kfo::cuda {

// Every packed row that a kernel reads, and every one that it writes. The scratch memory is both.
enum Source : int8_t { kR, kG, kL, kdY, kddR, kddG, kddL, kBias, kIntermediates, kSources };
enum Target : int8_t { kY, kdR, kdG, kdL, kddY, kScratch, kTargets };

// A packed input. Row stride 0: one row for all tasks. Null data: an absent operand.
template <typename T>
struct Operand {
  const T* data;
  int64_t stride;
};

// A packed output. Null data: not needed.
template <typename T>
struct Output {
  T* data;
  int64_t stride;
};

template <typename T>
struct Data {
  Operand<T> sources[kSources];
  Output<T> targets[kTargets];

  __host__ __device__ Operand<T>& operator[](Source source) { return sources[source]; }
  __host__ __device__ const Operand<T>& operator[](Source source) const { return sources[source]; }
  __host__ __device__ Output<T>& operator[](Target target) { return targets[target]; }
  __host__ __device__ const Output<T>& operator[](Target target) const { return targets[target]; }

  __host__ __device__ bool has(Source source) const { return sources[source].data; }
  __host__ __device__ bool needs(Target target) const { return targets[target].data; }
};

// What a kernel is launched with, by value.
template <typename T, typename TableOfLaunch>
struct Arguments {
  TableOfLaunch table;
  Data<T> data;
};

}  // namespace kfo::cuda
