// Packed operands and outputs as the kernels see them. No torch, no CUDA.
#pragma once

#include <cstdint>

#include "../packed_rows.h"
#include "../qualifiers.h"

namespace kfo::cuda {

// Every packed row that a kernel reads, and every one that it writes. The scratch memory is both.
enum Source : int8_t { kR, kG, kL, kdY, kddR, kddG, kddL, kBias, kIntermediates, kSources };
enum Target : int8_t { kY, kdR, kdG, kdL, kddY, kScratch, kTargets };

template <typename T>
struct Data {
  PackedRows<const T> sources[kSources];
  PackedRows<T> targets[kTargets];

  __host__ __device__ PackedRows<const T>& operator[](Source source) { return sources[source]; }
  __host__ __device__ const PackedRows<const T>& operator[](Source source) const { return sources[source]; }
  __host__ __device__ PackedRows<T>& operator[](Target target) { return targets[target]; }
  __host__ __device__ const PackedRows<T>& operator[](Target target) const { return targets[target]; }

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
