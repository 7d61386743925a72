// The batch norm kernels on the host, against the formulas written out in float64. Argument: rounds of random sizes, or
// `smallest`. Compiled with -include host_device.h, which stands in for the CUDA runtime.
#include "cuda/batch_norm.cuh"

#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "device.h"

using namespace kfo::cuda;

static std::mt19937 rng(0);
static double worst = 0;
static long checks = 0;

struct Case {
  int64_t tasks, rows, channels;
  bool shared, relu, vectors;
  unsigned need, present;  // of dx, dweight, dbias or ddy; of ddx, ddweight, ddbias
  double mean = 0;
  int64_t chunk_rows = 0;  // of their own; 0: those of a launch
};

template <typename T>
Values draw(int64_t size, double scale = 1, double mean = 0) {
  std::normal_distribution<double> normal;
  Values out(static_cast<size_t>(size));
  for (double& x : out) x = static_cast<T>(mean + scale * normal(rng));
  return out;
}

static void compare(const Values& got, const Values& want, const char* what, double tolerance) {
  if (got.size() != want.size()) std::printf("FAIL %s size\n", what), std::exit(1);
  double scale = 1;
  for (double x : want) scale = std::max(scale, std::fabs(x));
  for (size_t e = 0; e < want.size(); ++e) {
    const double error = std::fabs(got[e] - want[e]) / scale;
    if (!(error <= tolerance)) {
      std::printf("FAIL %s element %zu: got %g want %g (scale %g)\n", what, e, got[e], want[e], scale);
      std::exit(1);
    }
    worst = std::max(worst, error / tolerance);
  }
  ++checks;
}

struct Reference {
  Values y, mean, rstd, dx, dweight, dbias, dx2, dweight2, ddy;
};

// The definition, and its derivatives by the rules for sums and products; nothing of the kernels' algebra.
static Reference reference(const Case& c, double eps, const Values& x, const Values& w, const Values& b,
                           const Values& dy, const Values& u, const Values& p, const Values& q) {
  const int64_t N = c.rows, C = c.channels, n = c.tasks * N * C, k = (c.shared ? 1 : c.tasks) * C;
  Reference out;
  out.y = out.dx = out.dx2 = out.ddy = Values(static_cast<size_t>(n));
  out.mean = out.rstd = Values(static_cast<size_t>(c.tasks * C));
  out.dweight = out.dbias = out.dweight2 = Values(static_cast<size_t>(k));
  for (int64_t t = 0; t < c.tasks; ++t)
    for (int64_t ch = 0; ch < C; ++ch) {
      const auto at = [&](int64_t row) { return static_cast<size_t>((t * N + row) * C + ch); };
      const size_t own = static_cast<size_t>((c.shared ? 0 : t * C) + ch);
      const double wt = w[own], pt = p.empty() ? 0 : p[own], qt = q.empty() ? 0 : q[own];
      double mean = 0, variance = 0;
      for (int64_t i = 0; i < N; ++i) mean += x[at(i)] / static_cast<double>(N);
      for (int64_t i = 0; i < N; ++i) variance += (x[at(i)] - mean) * (x[at(i)] - mean) / static_cast<double>(N);
      const double r = 1 / std::sqrt(variance + eps);
      out.mean[static_cast<size_t>(t * C + ch)] = mean, out.rstd[static_cast<size_t>(t * C + ch)] = r;
      std::vector<double> h(static_cast<size_t>(N)), g(h), s(h), e(h);
      double dw = 0, db = 0, U0 = 0, Ux = 0, A = 0;
      for (int64_t i = 0; i < N; ++i) {
        const auto j = static_cast<size_t>(i);
        h[j] = (x[at(i)] - mean) * r;
        const double z = wt * h[j] + b[own];
        out.y[at(i)] = c.relu && z <= 0 ? 0 : z;
        g[j] = c.relu && z <= 0 ? 0 : dy[at(i)];
        s[j] = u.empty() ? 0 : u[at(i)];
        dw += g[j] * h[j], db += g[j], U0 += s[j], Ux += s[j] * h[j], A += s[j] * g[j];
      }
      const double M = static_cast<double>(N), Q = A - U0 * db / M - Ux * dw / M;
      double mean_e = 0, mean_eh = 0;
      for (size_t j = 0; j < h.size(); ++j) {
        e[j] = wt * r * (-s[j] * dw / M - Ux * g[j] / M) + pt * g[j];
        mean_e += e[j] / M, mean_eh += e[j] * h[j] / M;
      }
      for (int64_t i = 0; i < N; ++i) {
        const auto j = static_cast<size_t>(i);
        const bool open = !c.relu || wt * h[j] + b[own] > 0;
        out.dx[at(i)] = wt * r * (g[j] - db / M - h[j] * dw / M);
        out.dx2[at(i)] = r * (e[j] - mean_e - h[j] * mean_eh) - wt * r * r * h[j] * Q / M;
        out.ddy[at(i)] = open ? wt * r * (s[j] - U0 / M - h[j] * Ux / M) + pt * h[j] + qt : 0;
      }
      out.dweight[own] += dw, out.dbias[own] += db, out.dweight2[own] += r * Q;
    }
  return out;
}

template <typename T>
void run_case(const Case& c) {
  const int64_t n = c.tasks * c.rows * c.channels, per_task = c.tasks * c.channels;
  const int64_t parameters = (c.shared ? 1 : c.tasks) * c.channels;
  const double eps = 0.1, nan = std::nan("");
  Values vx = draw<T>(n, 1.5, c.mean), vw = draw<T>(parameters), vb = draw<T>(parameters), vdy = draw<T>(n);
  // A bias so far off that no value lies near the ReLU's corner, where rounding decides.
  for (double& value : vb) value = static_cast<T>(value > 0 ? 40 : -40);
  const Values vu = c.present & 1 ? draw<T>(n) : Values(), vp = c.present & 2 ? draw<T>(parameters) : Values(),
               vq = c.present & 4 ? draw<T>(parameters) : Values();
  for (size_t i = 0; i < vw.size(); ++i)
    if (i % 3 == 1) vb[i] = static_cast<T>(0.25);  // and some with both sides
  const Reference want = reference(c, eps, vx, vw, vb, vdy, vu, vp, vq);

  const bool a = c.vectors;
  Device<T> x(vx, a), dy(vdy, a), u(vu, a), w(vw, false), b(vb, false), p(vp, false), q(vq, false);
  const Values empty(static_cast<size_t>(n), nan), empty_rows(static_cast<size_t>(per_task), nan);
  Device<T> y(empty, a), dx(empty, a), dx2(empty, a), ddy(empty, a), mean(empty_rows, false), rstd(empty_rows, false);
  Device<T> dw(empty_rows, false), db(empty_rows, false), dw2(empty_rows, false);

  BatchNormArguments<T> args{};
  args.tasks = c.tasks, args.rows = c.rows, args.channels = c.channels, args.relu = c.relu;
  args.vectors = c.vectors, args.eps = static_cast<T>(eps);
  args.weight_stride = args.bias_stride = c.shared ? 0 : c.channels;
  cut_batch_norm(args);
  if (c.chunk_rows) {
    args.chunk_rows = c.chunk_rows;
    args.chunks = args.launched = static_cast<int32_t>((c.rows + c.chunk_rows - 1) / c.chunk_rows);
  }
  const int64_t tiles = c.tasks * args.groups, blocks = tiles * args.chunks;
  args.x = x.data(), args.weight = w.data(), args.bias = b.data();
  // Scratch memory of exactly the size that the launches ask for.
  const auto order = [&](auto sums, auto elementwise, int S, BatchNormArguments<T> own, bool whole) {
    Device<T> scratch(Values(static_cast<size_t>(blocks * S * group_channels<T>()), nan), true);
    own.partials = scratch.data();
    kfo::emulation::launch(sums, blocks, kThreads, S * kBatchNormSharedBytes, own);
    own.launched = whole ? own.chunks : 1;
    kfo::emulation::launch(elementwise, tiles * own.launched, kThreads, S * kBatchNormSharedBytes, own);
  };
  const double tolerance = (sizeof(T) == 4 ? 3e-6 : 1e-13) * (1 + std::fabs(c.mean));

  BatchNormArguments<T> first = args;
  first.y = y.data(), first.new_mean = mean.data(), first.new_rstd = rstd.data();
  order(batch_norm_statistics_kernel<T>, batch_norm_forward_kernel<T>, 3, first, true);
  compare(y.values(), want.y, "y", tolerance);
  compare(mean.values(), want.mean, "mean", tolerance);
  compare(rstd.values(), want.rstd, "rstd", tolerance);

  args.mean = mean.data(), args.rstd = rstd.data(), args.dy = dy.data();
  const auto over_tasks = [&](Device<T>& rows) {
    if (!c.shared) return rows.values();
    Device<T> out(Values(static_cast<size_t>(c.channels), nan), false);
    const TaskSumArguments<T> sum{c.tasks, c.channels, {nullptr, rows.data()}, {nullptr, out.data()}};
    kfo::emulation::launch(batch_norm_task_sum_kernel<T>, (2 * c.channels + kThreads - 1) / kThreads, kThreads, 0, sum);
    return out.values();
  };
  BatchNormArguments<T> second = args;
  if (c.need & 1) second.dx = dx.data();
  if (c.need & 2) second.dweight = dw.data();
  if (c.need & 4) second.dbias = db.data();
  order(batch_norm_backward_sums_kernel<T>, batch_norm_backward_kernel<T>, 2, second, c.need & 1);
  if (c.need & 1) compare(dx.values(), want.dx, "dx", tolerance);
  if (c.need & 2) compare(over_tasks(dw), want.dweight, "dweight", tolerance);
  if (c.need & 4) compare(over_tasks(db), want.dbias, "dbias", tolerance);

  BatchNormArguments<T> third = args;
  if (c.present & 1) third.ddx = u.data();
  if (c.present & 2) third.ddweight = p.data();
  if (c.present & 4) third.ddbias = q.data();
  if (c.need & 1) third.dx = dx2.data();
  if (c.need & 2) third.dweight = dw2.data();
  if (c.need & 4) third.ddy = ddy.data();
  order(batch_norm_double_backward_sums_kernel<T>, batch_norm_double_backward_kernel<T>, 5, third, c.need & 5);
  if (c.need & 1) compare(dx2.values(), want.dx2, "second dx", tolerance);
  if (c.need & 2) compare(over_tasks(dw2), want.dweight2, "second dweight", tolerance);
  if (c.need & 4) compare(ddy.values(), want.ddy, "ddy", tolerance);
}

// One block less than the next power of two is the most that a launch may have.
static void check_most_blocks() {
  BatchNormArguments<float> args{};
  args.rows = 5, args.channels = 4, args.tasks = (int64_t{1} << 31) - 1;
  if (cut_batch_norm(args) != args.tasks) std::printf("FAIL blocks\n"), std::exit(1);
  args.tasks += 1;
  try {
    cut_batch_norm(args);
  } catch (const std::invalid_argument&) {
    return;
  }
  std::printf("FAIL more blocks than a launch may have\n"), std::exit(1);
}

int main(int argc, char** argv) {
  check_most_blocks();
  const auto both = [](Case c) {
    run_case<float>(c);
    run_case<double>(c);
  };
  // Several chunks and groups, with and without 16-byte accesses.
  both({2, 70, 36, true, true, true, 7, 7});
  // More chunks than slices of them.
  both({1, 37, 3, false, true, false, 7, 7, 0, 4});
  // As many rows for each thread as are loaded at once, and more; and without ddx.
  both({1, 330, 36, false, true, true, 7, 7, 0, 150});
  both({1, 150, 4, false, true, true, 7, 6, 0, 150});
  if (argc > 1 && std::strcmp(argv[1], "smallest") != 0) {
    for (unsigned need = 1; need < 8; ++need)
      for (unsigned present = 0; present < 8; ++present)
        both({2, 40, 5, present % 2 == 0, need % 2 == 0, false, need, present});
    both({0, 5, 3, true, true, false, 7, 7});
    both({0, 5, 3, false, true, false, 7, 7});
    both({3, 1, 1, false, true, false, 7, 7});
    both({1, 4100, 4, true, true, true, 7, 7});
    both({1, 4099, 33, false, false, false, 7, 7, 300});
    const int64_t channels[] = {1, 3, 4, 16, 31, 32, 33, 64, 68};
    for (int i = std::atoi(argv[1]); i > 0; --i) {
      Case c{1 + static_cast<int64_t>(rng() % 4), 1 + static_cast<int64_t>(rng() % 200), channels[rng() % 9]};
      c.shared = rng() % 2, c.relu = rng() % 2, c.vectors = c.channels % 4 == 0 && rng() % 2;
      c.need = 1 + static_cast<unsigned>(rng() % 7), c.present = static_cast<unsigned>(rng() % 8);
      both(c);
    }
  }
  std::printf("%ld comparisons, worst error %.2f of the tolerance\n", checks, worst);
}
