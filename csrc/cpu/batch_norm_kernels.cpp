// The batch norm kernels of one instruction set: compiled once for each, with KFO_ISA naming the namespace of the table
// it defines. Everything else in this file has internal linkage.
//
// Each order reads its rows twice: once for sums over them, once for what is elementwise. Both go by blocks of rows
// that stay in the first-level cache, the second from the last block back, which is then the likeliest to be cached.
// Sums within a block are in T, across blocks in double: so their error does not grow with the number of rows. The
// variance is that of each block about its own mean, and blocks are merged with their means (Chan, Golub and LeVeque),
// so it holds for means far from zero.
#include "batch_norm_kernels.h"

#include <cmath>

#include "../batch_norm.h"
#include "../integers.h"
#include "vec.h"

namespace {

using kfo::smaller;
using kfo::cpu::BatchNormJob;
using kfo::cpu::kBatchNormChannels;

constexpr int64_t kBlockRows = 64;

// Up to kLanes<T> channels, the first of them `first`.
template <class T>
struct Lanes {
  int64_t first;
  int count;

  Vec<T> load(const T* data) const {
    return count == kLanes<T> ? ::load(data + first) : load_first(data + first, count);
  }
  void store(T* data, Vec<T> v) const {
    if (count == kLanes<T>)
      ::store(data + first, v);
    else
      store_first(data + first, v, count);
  }
};

template <class T, class Run>
void for_lanes(int64_t channels, Run run) {
  for (int64_t c = 0; c < channels; c += kLanes<T>)
    run(Lanes<T>{c, static_cast<int>(smaller(kLanes<T>, channels - c))});
}

// add(row, Vec sums[S]) for each row, `kFlight` rows in flight; then adds each sum's lanes to totals[s][channel].
template <class T, int S, int kFlight, class Add>
inline void add_rows(int64_t begin, int64_t end, const Lanes<T>& lanes, double (*totals)[kBatchNormChannels], Add add) {
  Vec<T> sums[kFlight][S] = {};
  int64_t row = begin;
  for (; row + kFlight <= end; row += kFlight) {
#pragma GCC unroll 8
    for (int i = 0; i < kFlight; ++i) add(row + i, sums[i]);
  }
  for (; row < end; ++row) add(row, sums[0]);
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) {
#pragma GCC unroll 8
    for (int i = 1; i < kFlight; ++i) sums[0][s] += sums[i][s];
    T lane[kLanes<T>];
    store(lane, sums[0][s]);
    for (int i = 0; i < lanes.count; ++i) totals[s][lanes.first + i] += lane[i];
  }
}

// x where z is positive, else zero; also x where z is not a number, which must not disappear.
template <bool kRelu, class V>
inline V where_positive(V z, V x) {
  if constexpr (kRelu)
    return z <= V{} ? V{} : x;
  else
    return x;
}

// Per-channel numbers of a job, as T: so that every order computes the same z, bit by bit.
template <class T>
struct Affine {
  T a[kBatchNormChannels];

  Affine(const BatchNormJob<T>& job, const T* rstd) {
    for (int64_t c = 0; c < job.channels; ++c) a[c] = job.weight[c] * rstd[c];
  }
};

template <class T>
void statistics(const BatchNormJob<T>& job) {
  double mean[kBatchNormChannels] = {}, squares[kBatchNormChannels] = {};
  for (int64_t begin = 0; begin < job.rows; begin += kBlockRows) {
    const int64_t end = smaller(begin + kBlockRows, job.rows);
    const double n = static_cast<double>(end - begin), before = static_cast<double>(begin);
    double sums[1][kBatchNormChannels] = {}, centred[2][kBatchNormChannels] = {};
    T middle[kBatchNormChannels];
    for_lanes<T>(job.channels, [&](const Lanes<T>& lanes) {
      add_rows<T, 1, 8>(begin, end, lanes, sums,
                        [&](int64_t row, Vec<T>* sum) { sum[0] += lanes.load(job.x + row * job.stride); });
      for (int64_t c = lanes.first; c < lanes.first + lanes.count; ++c) middle[c] = static_cast<T>(sums[0][c] / n);
      const Vec<T> about = lanes.load(middle);
      add_rows<T, 2, 4>(begin, end, lanes, centred, [&](int64_t row, Vec<T>* sum) {
        const Vec<T> d = lanes.load(job.x + row * job.stride) - about;
        sum[0] += d;
        sum[1] = multiply_add(d, d, sum[1]);
      });
    });
    for (int64_t c = 0; c < job.channels; ++c) {
      const double rest = centred[0][c] / n, delta = static_cast<double>(middle[c]) + rest - mean[c];
      squares[c] += centred[1][c] - rest * centred[0][c] + delta * delta * (before * n / (before + n));
      mean[c] += delta * (n / (before + n));
    }
  }
  for (int64_t c = 0; c < job.channels; ++c) {
    job.new_mean[c] = static_cast<T>(mean[c]);
    job.new_rstd[c] = static_cast<T>(1 / std::sqrt(squares[c] / static_cast<double>(job.rows) + job.eps));
  }
}

// run(begin, end, lanes) for every block of rows, the last first.
template <class T, class Run>
void for_blocks_backwards(const BatchNormJob<T>& job, Run run) {
  for (int64_t begin = (job.rows - 1) / kBlockRows * kBlockRows; begin >= 0; begin -= kBlockRows)
    for_lanes<T>(job.channels,
                 [&](const Lanes<T>& lanes) { run(begin, smaller(begin + kBlockRows, job.rows), lanes); });
}

template <class T, bool kRelu>
void forward(const BatchNormJob<T>& job) {
  statistics(job);
  const Affine<T> affine(job, job.new_rstd);
  for_blocks_backwards(job, [&](int64_t begin, int64_t end, const Lanes<T>& lanes) {
    const Vec<T> mean = lanes.load(job.new_mean), a = lanes.load(affine.a), b = lanes.load(job.bias);
    for (int64_t row = begin; row < end; ++row) {
      const Vec<T> z = multiply_add(lanes.load(job.x + row * job.stride) - mean, a, b);
      lanes.store(job.y + row * job.stride, where_positive<kRelu>(z, z));
    }
  });
}

template <class T, bool kRelu>
void backward(const BatchNormJob<T>& job) {
  const Affine<T> affine(job, job.rstd);
  double sums[2][kBatchNormChannels] = {};
  for (int64_t begin = 0; begin < job.rows; begin += kBlockRows)
    for_lanes<T>(job.channels, [&](const Lanes<T>& lanes) {
      const Vec<T> mean = lanes.load(job.mean), a = lanes.load(affine.a), b = lanes.load(job.bias);
      add_rows<T, 2, 4>(begin, smaller(begin + kBlockRows, job.rows), lanes, sums, [&](int64_t row, Vec<T>* sum) {
        const Vec<T> d = lanes.load(job.x + row * job.stride) - mean;
        const Vec<T> g = where_positive<kRelu>(multiply_add(d, a, b), lanes.load(job.dy + row * job.stride));
        sum[0] += g;
        sum[1] = multiply_add(g, d, sum[1]);
      });
    });

  T of_g[kBatchNormChannels], of_d[kBatchNormChannels], constant[kBatchNormChannels];
  for (int64_t c = 0; c < job.channels; ++c) {
    const BackwardCoefficients<double> k = backward_coefficients<double>(static_cast<double>(job.rows), job.weight[c],
                                                                         job.rstd[c], {sums[0][c], sums[1][c]});
    of_g[c] = static_cast<T>(k.of_g), of_d[c] = static_cast<T>(k.of_d), constant[c] = static_cast<T>(k.constant);
    if (job.dweight) job.dweight[c] = static_cast<T>(k.dweight);
    if (job.dbias) job.dbias[c] = static_cast<T>(k.dbias);
  }
  if (!job.dx) return;
  for_blocks_backwards(job, [&](int64_t begin, int64_t end, const Lanes<T>& lanes) {
    const Vec<T> mean = lanes.load(job.mean), a = lanes.load(affine.a), b = lanes.load(job.bias);
    const Vec<T> by_g = lanes.load(of_g), by_d = lanes.load(of_d), one = lanes.load(constant);
    for (int64_t row = begin; row < end; ++row) {
      const Vec<T> d = lanes.load(job.x + row * job.stride) - mean;
      const Vec<T> g = where_positive<kRelu>(multiply_add(d, a, b), lanes.load(job.dy + row * job.stride));
      lanes.store(job.dx + row * job.stride, multiply_add(g, by_g, multiply_add(d, by_d, one)));
    }
  });
}

// kU: whether there is a cotangent of dx.
template <class T, bool kRelu, bool kU>
void double_backward(const BatchNormJob<T>& job) {
  const Affine<T> affine(job, job.rstd);
  const auto u_at = [&](int64_t row, const Lanes<T>& lanes) {
    if constexpr (kU)
      return lanes.load(job.ddx + row * job.stride);
    else
      return Vec<T>{};
  };
  double sums[5][kBatchNormChannels] = {};
  for (int64_t begin = 0; begin < job.rows; begin += kBlockRows)
    for_lanes<T>(job.channels, [&](const Lanes<T>& lanes) {
      const Vec<T> mean = lanes.load(job.mean), a = lanes.load(affine.a), b = lanes.load(job.bias);
      add_rows<T, 5, 2>(begin, smaller(begin + kBlockRows, job.rows), lanes, sums, [&](int64_t row, Vec<T>* sum) {
        const Vec<T> d = lanes.load(job.x + row * job.stride) - mean;
        const Vec<T> g = where_positive<kRelu>(multiply_add(d, a, b), lanes.load(job.dy + row * job.stride));
        const Vec<T> u = u_at(row, lanes);
        sum[0] += g;
        sum[1] = multiply_add(g, d, sum[1]);
        sum[2] += u;
        sum[3] = multiply_add(u, d, sum[3]);
        sum[4] = multiply_add(u, g, sum[4]);
      });
    });

  T dx_of_u[kBatchNormChannels], dx_of_g[kBatchNormChannels], dx_of_d[kBatchNormChannels];
  T ddy_of_u[kBatchNormChannels], ddy_of_d[kBatchNormChannels];
  T dx_constant[kBatchNormChannels], ddy_constant[kBatchNormChannels];
  for (int64_t c = 0; c < job.channels; ++c) {
    const double p = job.ddweight ? job.ddweight[c] : 0, q = job.ddbias ? job.ddbias[c] : 0;
    const DoubleBackwardCoefficients<double> k =
        double_backward_coefficients<double>(static_cast<double>(job.rows), job.weight[c], job.rstd[c], p, q,
                                             {sums[0][c], sums[1][c], sums[2][c], sums[3][c], sums[4][c]});
    dx_of_u[c] = static_cast<T>(k.dx_of_u), dx_of_g[c] = static_cast<T>(k.dx_of_g);
    dx_of_d[c] = static_cast<T>(k.dx_of_d), dx_constant[c] = static_cast<T>(k.dx_constant);
    ddy_of_u[c] = static_cast<T>(k.ddy_of_u), ddy_of_d[c] = static_cast<T>(k.ddy_of_d);
    ddy_constant[c] = static_cast<T>(k.ddy_constant);
    if (job.dweight) job.dweight[c] = static_cast<T>(k.dweight);
  }
  for_blocks_backwards(job, [&](int64_t begin, int64_t end, const Lanes<T>& lanes) {
    const Vec<T> mean = lanes.load(job.mean), a = lanes.load(affine.a), b = lanes.load(job.bias);
    if (job.dx) {
      const Vec<T> by_u = lanes.load(dx_of_u), by_g = lanes.load(dx_of_g);
      const Vec<T> by_d = lanes.load(dx_of_d), one = lanes.load(dx_constant);
      for (int64_t row = begin; row < end; ++row) {
        const Vec<T> d = lanes.load(job.x + row * job.stride) - mean;
        const Vec<T> g = where_positive<kRelu>(multiply_add(d, a, b), lanes.load(job.dy + row * job.stride));
        Vec<T> dx = multiply_add(g, by_g, multiply_add(d, by_d, one));
        if constexpr (kU) dx = multiply_add(u_at(row, lanes), by_u, dx);
        lanes.store(job.dx + row * job.stride, dx);
      }
    }
    // From the cache, where the loop above, or the block's neighbours, have brought x and u.
    if (job.ddy) {
      const Vec<T> by_u = lanes.load(ddy_of_u), by_d = lanes.load(ddy_of_d), one = lanes.load(ddy_constant);
      for (int64_t row = begin; row < end; ++row) {
        const Vec<T> d = lanes.load(job.x + row * job.stride) - mean;
        Vec<T> ddy = multiply_add(d, by_d, one);
        if constexpr (kU) ddy = multiply_add(u_at(row, lanes), by_u, ddy);
        lanes.store(job.ddy + row * job.stride, where_positive<kRelu>(multiply_add(d, a, b), ddy));
      }
    }
  });
}

template <class T>
void run_forward(const BatchNormJob<T>& job) {
  job.relu ? forward<T, true>(job) : forward<T, false>(job);
}

template <class T>
void run_backward(const BatchNormJob<T>& job) {
  job.relu ? backward<T, true>(job) : backward<T, false>(job);
}

template <class T>
void run_double_backward(const BatchNormJob<T>& job) {
  if (job.ddx)
    job.relu ? double_backward<T, true, true>(job) : double_backward<T, false, true>(job);
  else
    job.relu ? double_backward<T, true, false>(job) : double_backward<T, false, false>(job);
}

template <class T>
constexpr kfo::cpu::BatchNormOrders<T> orders() {
  return {run_forward<T>, run_backward<T>, run_double_backward<T>};
}

}  // namespace

namespace kfo::cpu::KFO_ISA {

const BatchNormKernels batch_norm_kernels = {orders<float>(), orders<double>()};

}  // namespace kfo::cpu::KFO_ISA
