// A thread block of the batch norm kernels: its rows and channels, how they are read and written, sums over its rows
// and over the chunks of a task.
#pragma once

#include "batch_norm.h"
#include "staging.cuh"

namespace kfo::cuda {

template <typename T>
class BatchNormBlock {
 public:
  static constexpr int kWidth = Vector<T>::kWidth, kGroup = group_channels<T>();
  using Values = Vector<T>;  // of this thread's channels

  __device__ __forceinline__ explicit BatchNormBlock(const BatchNormArguments<T>& args) : args_(args) {
    chunk_ = static_cast<int>(blockIdx.x % args.launched);
    tile_ = static_cast<int64_t>(blockIdx.x) / args.launched;
    task_ = tile_ / args.groups;
    column_ = static_cast<int>(threadIdx.x) % kBatchNormColumns;
    lane_ = static_cast<int>(threadIdx.x) / kBatchNormColumns;
    group_ = tile_ % args.groups * kGroup;
    first_ = group_ + column_ * kWidth;
    const int64_t left = args.channels - first_;
    count_ = left < 0 ? 0 : left < kWidth ? static_cast<int>(left) : kWidth;
    begin_ = chunk_ * args.chunk_rows;
    const int64_t end = begin_ + args.chunk_rows;
    end_ = end < args.rows ? end : args.rows;
  }

  __device__ __forceinline__ int chunk() const { return chunk_; }
  __device__ __forceinline__ int64_t rows_of(int chunk) const {
    const int64_t begin = chunk * args_.chunk_rows, end = begin + args_.chunk_rows;
    return (end < args_.rows ? end : args_.rows) - begin;
  }

  // f(this thread's channels of each source, their offset) for the rows of the chunk that are this thread's. Several
  // rows are loaded at once, and before the ones in front of them are used: left alone, the compiler moves every load
  // down to its use, and the thread waits for each.
  template <int S, typename F>
  __device__ __forceinline__ void for_rows(const T* const (&from)[S], F f) const {
    constexpr int kAtOnce = S == 1 ? 4 : 2;
    constexpr int64_t kStep = kAtOnce * kBatchNormLanes;
    if (count_ == 0) return;
    int64_t row = begin_ + lane_;
    if (args_.vectors) {
      const int64_t last = end_ - (kStep - kBatchNormLanes);  // before it all rows at once are there
      if (row < last) {
        Values values[kAtOnce][S];
        load_rows(from, row, values);
#pragma unroll 1
        for (bool more = true; more; row += kStep) {
          Values next[kAtOnce][S];
          more = row + kStep < last;
          if (more) load_rows(from, row + kStep, next);
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) f(values[k], at(row + k * kBatchNormLanes));
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k)
#pragma unroll
            for (int s = 0; s < S; ++s) values[k][s] = next[k][s];
        }
      }
#pragma unroll 1
      for (; row < end_; row += kBatchNormLanes) {
        Values values[1][S];
        load_rows(from, row, values);
        f(values[0], at(row));
      }
      return;
    }
#pragma unroll 1
    for (; row < end_; row += kBatchNormLanes) {
      Values values[S];
#pragma unroll
      for (int s = 0; s < S; ++s) values[s] = load_elements(from[s] + at(row));
      f(values, at(row));
    }
  }

  // f(x, dy and ddx of a row, their offset), as `for_rows`; ddx is zero where it is absent.
  template <typename F>
  __device__ __forceinline__ void for_rows_with_ddx(F f) const {
    if (args_.ddx)
      for_rows({args_.x, args_.dy, args_.ddx},
               [&](const Values(&row)[3], int64_t at) { f(row[0], row[1], row[2], at); });
    else
      for_rows({args_.x, args_.dy}, [&](const Values(&row)[2], int64_t at) { f(row[0], row[1], Values{}, at); });
  }

  // Offset of this thread's channels of a row.
  __device__ __forceinline__ int64_t at(int64_t row) const {
    return (task_ * args_.rows + row) * args_.channels + first_;
  }

  // Rows `row`, and so many lanes on as there are in `values`.
  template <int K, int S>
  __device__ __forceinline__ void load_rows(const T* const (&from)[S], int64_t row, Values (&values)[K][S]) const {
#pragma unroll
    for (int k = 0; k < K; ++k)
#pragma unroll
      for (int s = 0; s < S; ++s)
        values[k][s] = *reinterpret_cast<const Values*>(from[s] + at(row + k * kBatchNormLanes));
  }
  __device__ __forceinline__ Values load_elements(const T* data) const {
    Values out{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count_) out.at[i] = data[i];
    return out;
  }
  __device__ __forceinline__ void store(T* data, int64_t at, const Values& values) const {
    if (args_.vectors) {
      store_vector(data + at, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count_) data[at + i] = values.at[i];
  }

  // This thread's channels of a row of the task, of a parameter or a statistic.
  __device__ __forceinline__ Values channels_of(const T* data, int64_t stride) const {
    Values out{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count_) out.at[i] = data[task_ * stride + first_ + i];
    return out;
  }

  // take(sum, channel of the group, total) by one thread for each sum over the block's rows. Before shared memory is
  // used again the caller waits.
  template <int S, typename Take>
  __device__ __forceinline__ void reduce(const T (&sums)[S][kWidth], Take take) const {
    T* shared = shared_array<T>();
#pragma unroll
    for (int s = 0; s < S; ++s)
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        shared[(s * kBatchNormLanes + lane_) * kGroup + column_ * kWidth + i] = sums[s][i];
    __syncthreads();
    for (int e = threadIdx.x; e < S * kGroup; e += kThreads) {
      const int s = e / kGroup, channel = e % kGroup;
      T total = 0;
#pragma unroll
      for (int lane = 0; lane < kBatchNormLanes; ++lane)
        total += shared[(s * kBatchNormLanes + lane) * kGroup + channel];
      take(s, channel, total);
    }
  }

  // The block's sums, to the scratch memory.
  template <int S>
  __device__ __forceinline__ void write_partials(const T (&sums)[S][kWidth]) const {
    T* out = args_.partials + (tile_ * args_.chunks + chunk_) * (S * kGroup);
    reduce<S>(sums, [&](int s, int channel, T total) { out[s * kGroup + channel] = total; });
  }

  // Of S sums, the one of a chunk and channel.
  template <int S>
  __device__ __forceinline__ T partial(int chunk, int s, int channel) const {
    return args_.partials[((tile_ * args_.chunks + chunk) * S + s) * kGroup + channel];
  }

  // Sums term(chunk, e) over the chunks for every e < count, to shared memory; complete on return. The chunks are
  // summed in slices, by all threads, then slice by slice.
  template <typename Term>
  __device__ __forceinline__ void sum_chunks(int count, Term term) const {
    constexpr int kSlices = kThreads / kGroup;
    T* shared = shared_array<T>();
    for (int i = threadIdx.x; i < count * kSlices; i += kThreads) {
      T total = 0;
#pragma unroll 4
      for (int chunk = i / count; chunk < args_.chunks; chunk += kSlices) total += term(chunk, i % count);
      shared[count + i] = total;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < count; e += kThreads) {
      T total = 0;
#pragma unroll
      for (int slice = 1; slice <= kSlices; ++slice) total += shared[slice * count + e];
      shared[e] = total;
    }
    __syncthreads();
  }

  // The sums of all chunks, to shared memory; complete on return.
  template <int S>
  __device__ __forceinline__ void merge() const {
    sum_chunks(S * kGroup, [&](int chunk, int e) { return partial<S>(chunk, e / kGroup, e % kGroup); });
  }

  // finish(channel of the group, offset of the channel in a (tasks, channels) array, and in a row) by one thread each.
  template <typename Finish>
  __device__ __forceinline__ void for_channels(Finish finish) const {
    const int channel = static_cast<int>(threadIdx.x);
    if (channel < kGroup && group_ + channel < args_.channels)
      finish(channel, task_ * args_.channels + group_ + channel, group_ + channel);
  }

  // Number `index` of those kept in shared memory for each channel.
  __device__ __forceinline__ static T& kept(int index, int channel) {
    return shared_array<T>()[index * kGroup + channel];
  }
  __device__ __forceinline__ Values kept(int index) const {
    Values out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.at[i] = kept(index, column_ * kWidth + i);
    return out;
  }

  __device__ __forceinline__ T parameter(const T* data, int64_t stride, int64_t channel) const {
    return data ? data[task_ * stride + channel] : T(0);
  }

 private:
  const BatchNormArguments<T>& args_;
  int chunk_, column_, lane_, count_;
  int64_t tile_, task_, group_, first_, begin_, end_;
};

}  // namespace kfo::cuda
