// The three orders of batch norm + ReLU by batch statistics: see batch_norm.h for the launches, ../batch_norm.h for the
// formulas. Sums over rows are in T, by thread, then thread by thread of a block, then chunk by chunk: a tree of fixed
// order. The variance is that of each chunk about its own mean, merged with the chunks' means, so it holds for means
// far from zero.
#pragma once

#include "../batch_norm.h"
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

  // f(offset of this thread's channels) for the rows of the chunk that are this thread's.
  template <typename F>
  __device__ __forceinline__ void for_rows(F f) const {
    if (count_ == 0) return;
#pragma unroll 2
    for (int64_t row = begin_ + lane_; row < end_; row += kBatchNormLanes)
      f((task_ * args_.rows + row) * args_.channels + first_);
  }

  __device__ __forceinline__ Values load(const T* data, int64_t at) const {
    if (args_.vectors) return *reinterpret_cast<const Values*>(data + at);
    Values out{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (i < count_) out.at[i] = data[at + i];
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

  // Adds the chunks' sums, in order, to shared memory; complete on return.
  template <int S>
  __device__ __forceinline__ void merge() const {
    for (int e = threadIdx.x; e < S * kGroup; e += kThreads) {
      T total = 0;
#pragma unroll 8
      for (int chunk = 0; chunk < args_.chunks; ++chunk) total += partial<S>(chunk, e / kGroup, e % kGroup);
      shared_array<T>()[e] = total;
    }
    __syncthreads();
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

// d = x - mean and g = [z > 0] dy of this thread's channels, by the same operations in every order.
template <typename T>
class Normalised {
 public:
  using Values = Vector<T>;

  __device__ __forceinline__ Normalised(const BatchNormArguments<T>& args, const BatchNormBlock<T>& block)
      : relu_(args.relu), mean_(block.channels_of(args.mean, args.channels)) {
    const Values weight = block.channels_of(args.weight, args.weight_stride);
    const Values rstd = block.channels_of(args.rstd, args.channels);
    b_ = block.channels_of(args.bias, args.bias_stride);
#pragma unroll
    for (int i = 0; i < Values::kWidth; ++i) a_.at[i] = weight.at[i] * rstd.at[i];
  }
  __device__ __forceinline__ Normalised(bool relu, const Values& mean, const Values& a, const Values& b)
      : relu_(relu), mean_(mean), a_(a), b_(b) {}

  __device__ __forceinline__ T d(int i, T x) const { return x - mean_.at[i]; }
  __device__ __forceinline__ T z(int i, T d) const { return fma(d, a_.at[i], b_.at[i]); }
  // Also where z is not a number, which must not disappear.
  __device__ __forceinline__ T where_positive(int i, T d, T value) const {
    return relu_ && z(i, d) <= 0 ? T(0) : value;
  }

 private:
  bool relu_;
  Values mean_, a_, b_;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_statistics_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  const T n = static_cast<T>(block.rows_of(block.chunk()));
  T sums[1][kWidth] = {};
  block.for_rows([&](int64_t at) {
    const Vector<T> x = block.load(args.x, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[0][i] += x.at[i];
  });
  block.template reduce<1>(sums, [&](int, int channel, T total) { block.kept(0, channel) = total / n; });
  __syncthreads();
  const Vector<T> mean = block.kept(0);
  __syncthreads();
  T centred[2][kWidth] = {};
  block.for_rows([&](int64_t at) {
    const Vector<T> x = block.load(args.x, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = x.at[i] - mean.at[i];
      centred[0][i] += d;
      centred[1][i] = fma(d, d, centred[1][i]);
    }
  });
  // What the mean was short of by rounding: the next launch takes it off the squares, and adds it to the mean.
  T out[3][kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    out[0][i] = threadIdx.x < kBatchNormColumns ? mean.at[i] : T(0);
    out[1][i] = centred[0][i];
    out[2][i] = centred[1][i];
  }
  block.template write_partials<3>(out);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_forward_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  block.for_channels([&](int channel, int64_t at, int64_t in_row) {
    const T origin = block.template partial<3>(0, 0, channel), N = static_cast<T>(args.rows);
    T shift = 0, squares = 0;
#pragma unroll 4
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      const T n = static_cast<T>(block.rows_of(chunk));
      shift +=
          n * (block.template partial<3>(chunk, 0, channel) - origin) + block.template partial<3>(chunk, 1, channel);
    }
    const T mean = origin + shift / N;
#pragma unroll 4
    for (int chunk = 0; chunk < args.chunks; ++chunk) {
      const T n = static_cast<T>(block.rows_of(chunk)), rest = block.template partial<3>(chunk, 1, channel) / n;
      // From the origin, near which nothing is lost.
      const T off = block.template partial<3>(chunk, 0, channel) - origin + rest - shift / N;
      squares += block.template partial<3>(chunk, 2, channel) + n * (off * off - rest * rest);
    }
    const T rstd = 1 / sqrt(squares / N + args.eps);
    block.kept(0, channel) = mean;
    block.kept(1, channel) = block.parameter(args.weight, args.weight_stride, in_row) * rstd;
    if (block.chunk() == 0) {
      args.new_mean[at] = mean;
      args.new_rstd[at] = rstd;
    }
  });
  __syncthreads();
  const Normalised<T> normalised(args.relu, block.kept(0), block.kept(1),
                                 block.channels_of(args.bias, args.bias_stride));
  block.for_rows([&](int64_t at) {
    Vector<T> x = block.load(args.x, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]);
      x.at[i] = normalised.where_positive(i, d, normalised.z(i, d));
    }
    block.store(args.y, at, x);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_sums_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  T sums[2][kWidth] = {};
  block.for_rows([&](int64_t at) {
    const Vector<T> x = block.load(args.x, at), dy = block.load(args.dy, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]), g = normalised.where_positive(i, d, dy.at[i]);
      sums[0][i] += g;
      sums[1][i] = fma(g, d, sums[1][i]);
    }
  });
  block.template write_partials<2>(sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_backward_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  block.template merge<2>();
  block.for_channels([&](int channel, int64_t at, int64_t in_row) {
    const BackwardCoefficients<T> k =
        backward_coefficients<T>(static_cast<T>(args.rows), block.parameter(args.weight, args.weight_stride, in_row),
                                 args.rstd[at], {block.kept(0, channel), block.kept(1, channel)});
    // In place of the sums, which no other thread reads.
    block.kept(0, channel) = k.of_g;
    block.kept(1, channel) = k.of_d;
    block.kept(2, channel) = k.constant;
    if (block.chunk() == 0) {
      if (args.dweight) args.dweight[at] = k.dweight;
      if (args.dbias) args.dbias[at] = k.dbias;
    }
  });
  __syncthreads();
  if (!args.dx) return;
  const Vector<T> of_g = block.kept(0), of_d = block.kept(1), constant = block.kept(2);
  block.for_rows([&](int64_t at) {
    Vector<T> x = block.load(args.x, at);
    const Vector<T> dy = block.load(args.dy, at);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]), g = normalised.where_positive(i, d, dy.at[i]);
      x.at[i] = fma(g, of_g.at[i], fma(d, of_d.at[i], constant.at[i]));
    }
    block.store(args.dx, at, x);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_double_backward_sums_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  T sums[5][kWidth] = {};
  block.for_rows([&](int64_t at) {
    const Vector<T> x = block.load(args.x, at), dy = block.load(args.dy, at);
    const Vector<T> u = args.ddx ? block.load(args.ddx, at) : Vector<T>{};
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]), g = normalised.where_positive(i, d, dy.at[i]);
      sums[0][i] += g;
      sums[1][i] = fma(g, d, sums[1][i]);
      sums[2][i] += u.at[i];
      sums[3][i] = fma(u.at[i], d, sums[3][i]);
      sums[4][i] = fma(u.at[i], g, sums[4][i]);
    }
  });
  block.template write_partials<5>(sums);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_double_backward_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  block.template merge<5>();
  block.for_channels([&](int channel, int64_t at, int64_t in_row) {
    const auto sum = [&](int s) { return block.kept(s, channel); };
    const DoubleBackwardCoefficients<T> k = double_backward_coefficients<T>(
        static_cast<T>(args.rows), block.parameter(args.weight, args.weight_stride, in_row), args.rstd[at],
        block.parameter(args.ddweight, args.weight_stride, in_row),
        block.parameter(args.ddbias, args.bias_stride, in_row), {sum(0), sum(1), sum(2), sum(3), sum(4)});
    // In place of the sums, which no other thread reads.
    const T kept[] = {k.dx_of_u, k.dx_of_g, k.dx_of_d, k.dx_constant, k.ddy_of_u, k.ddy_of_d, k.ddy_constant};
#pragma unroll
    for (int i = 0; i < 7; ++i) block.kept(i, channel) = kept[i];
    if (block.chunk() == 0 && args.dweight) args.dweight[at] = k.dweight;
  });
  __syncthreads();
  if (!args.dx && !args.ddy) return;
  const Vector<T> dx_of_u = block.kept(0), dx_of_g = block.kept(1), dx_of_d = block.kept(2), dx_1 = block.kept(3);
  const Vector<T> ddy_of_u = block.kept(4), ddy_of_d = block.kept(5), ddy_1 = block.kept(6);
  block.for_rows([&](int64_t at) {
    const Vector<T> x = block.load(args.x, at), dy = block.load(args.dy, at);
    const Vector<T> u = args.ddx ? block.load(args.ddx, at) : Vector<T>{};
    Vector<T> dx, ddy;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]), g = normalised.where_positive(i, d, dy.at[i]);
      dx.at[i] = fma(u.at[i], dx_of_u.at[i], fma(g, dx_of_g.at[i], fma(d, dx_of_d.at[i], dx_1.at[i])));
      ddy.at[i] = normalised.where_positive(i, d, fma(u.at[i], ddy_of_u.at[i], fma(d, ddy_of_d.at[i], ddy_1.at[i])));
    }
    if (args.dx) block.store(args.dx, at, dx);
    if (args.ddy) block.store(args.ddy, at, ddy);
  });
}

// One element of one output, in the order of the tasks.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    batch_norm_task_sum_kernel(const __grid_constant__ TaskSumArguments<T> args) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int which = element >= args.channels;
  const int64_t channel = element - which * args.channels;
  if (channel >= args.channels || !args.to[which]) return;
  double total = 0;  // so that its error does not grow with the number of tasks
#pragma unroll 8
  for (int64_t task = 0; task < args.tasks; ++task) total += args.from[which][task * args.channels + channel];
  args.to[which][channel] = static_cast<T>(total);
}

}  // namespace kfo::cuda
