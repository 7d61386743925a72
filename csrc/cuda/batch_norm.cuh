// The three orders of batch norm + ReLU by batch statistics: see batch_norm.h for the launches, ../batch_norm.h for the
// formulas. Sums over rows are in T, by thread, then thread by thread of a block, then chunk by chunk in slices, then
// slice by slice: a tree of fixed order. The variance is that of each chunk about its own mean, merged with the chunks'
// means, so it holds for means far from zero.
#pragma once

#include "../batch_norm.h"
#include "batch_norm_block.cuh"

namespace kfo::cuda {

// Blocks that are to fit on one multiprocessor. Untold, the compiler keeps to fewer registers, and spills some.
constexpr int kResident = 4;

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
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_statistics_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  const T n = static_cast<T>(block.rows_of(block.chunk()));
  T sums[1][kWidth] = {};
  block.for_rows({args.x}, [&](const Vector<T>(&row)[1], int64_t) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sums[0][i] += row[0].at[i];
  });
  block.template reduce<1>(sums, [&](int, int channel, T total) { block.kept(0, channel) = total / n; });
  __syncthreads();
  const Vector<T> mean = block.kept(0);
  __syncthreads();
  T centred[2][kWidth] = {};
  block.for_rows({args.x}, [&](const Vector<T>(&row)[1], int64_t) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = row[0].at[i] - mean.at[i];
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
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_forward_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  const T N = static_cast<T>(args.rows);
  const auto origin = [&](int channel) { return block.template partial<3>(0, 0, channel); };
  block.sum_chunks(BatchNormBlock<T>::kGroup, [&](int chunk, int channel) {
    const T n = static_cast<T>(block.rows_of(chunk));
    return n * (block.template partial<3>(chunk, 0, channel) - origin(channel)) +
           block.template partial<3>(chunk, 1, channel);
  });
  T shift = 0;  // of the mean from the origin, times the rows
  block.for_channels([&](int channel, int64_t, int64_t) { shift = block.kept(0, channel); });
  block.sum_chunks(BatchNormBlock<T>::kGroup, [&](int chunk, int channel) {
    const T n = static_cast<T>(block.rows_of(chunk)), rest = block.template partial<3>(chunk, 1, channel) / n;
    // From the origin, near which nothing is lost.
    const T off = block.template partial<3>(chunk, 0, channel) - origin(channel) + rest - block.kept(0, channel) / N;
    return block.template partial<3>(chunk, 2, channel) + n * (off * off - rest * rest);
  });
  block.for_channels([&](int channel, int64_t at, int64_t in_row) {
    const T mean = origin(channel) + shift / N, squares = block.kept(0, channel);
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
  block.for_rows({args.x}, [&](const Vector<T>(&row)[1], int64_t at) {
    Vector<T> y;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, row[0].at[i]);
      y.at[i] = normalised.where_positive(i, d, normalised.z(i, d));
    }
    block.store(args.y, at, y);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_backward_sums_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  T sums[2][kWidth] = {};
  block.for_rows({args.x, args.dy}, [&](const Vector<T>(&row)[2], int64_t) {
    const Vector<T>&x = row[0], &dy = row[1];
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
__global__ void __launch_bounds__(kThreads, kResident)
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
  block.for_rows({args.x, args.dy}, [&](const Vector<T>(&row)[2], int64_t at) {
    const Vector<T>&x = row[0], &dy = row[1];
    Vector<T> dx;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const T d = normalised.d(i, x.at[i]), g = normalised.where_positive(i, d, dy.at[i]);
      dx.at[i] = fma(g, of_g.at[i], fma(d, of_d.at[i], constant.at[i]));
    }
    block.store(args.dx, at, dx);
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_double_backward_sums_kernel(const __grid_constant__ BatchNormArguments<T> args) {
  const BatchNormBlock<T> block(args);
  const Normalised<T> normalised(args, block);
  constexpr int kWidth = BatchNormBlock<T>::kWidth;
  T sums[5][kWidth] = {};
  block.for_rows_with_ddx([&](const Vector<T>& x, const Vector<T>& dy, const Vector<T>& u, int64_t) {
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
__global__ void __launch_bounds__(kThreads, kResident)
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
  block.for_rows_with_ddx([&](const Vector<T>& x, const Vector<T>& dy, const Vector<T>& u, int64_t at) {
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
