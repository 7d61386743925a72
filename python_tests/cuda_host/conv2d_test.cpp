// The convolution kernels on the host, against loops in float64. Argument: rounds of random sizes, or `smallest`.
// Compiled with -include host_device.h, which stands in for the CUDA runtime.
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

#include "cuda/conv2d_gather.cuh"
#include "cuda/conv2d_weight.cuh"
#include "device.h"

using namespace kfo::cuda;
using kfo::Conv2dShape;

static std::mt19937 rng(0);
static double worst = 0;
static long checks = 0;

struct Case {
  int64_t tasks;
  Conv2dShape shape;  // N, H, W, C, O, KH, KW, stride, padding
  int64_t aim = kConvBlocks;
  bool shared = false, aligned = true;  // weights of all tasks in one place; operands at 16-byte boundaries
};

template <typename T>
Values draw(int64_t size) {
  std::normal_distribution<double> normal;
  Values out(static_cast<size_t>(size));
  for (double& x : out) x = static_cast<T>(normal(rng));
  return out;
}

static void compare(const Values& got, const Values& want, const std::string& what, double tolerance) {
  double scale = 1;
  for (double x : want) scale = std::max(scale, std::fabs(x));
  if (got.size() != want.size()) std::printf("FAIL %s size\n", what.c_str()), std::exit(1);
  for (size_t e = 0; e < want.size(); ++e) {
    const double error = std::fabs(got[e] - want[e]) / scale;
    if (!(error <= tolerance)) {
      std::printf("FAIL %s element %zu: got %g want %g (scale %g)\n", what.c_str(), e, got[e], want[e], scale);
      std::exit(1);
    }
    worst = std::max(worst, error / tolerance);
  }
  ++checks;
}

// f(index into x, into weight, into y) for each product of the convolutions of all tasks.
template <typename F>
static void for_products(const Case& c, F f) {
  const Conv2dShape& s = c.shape;
  const int64_t Ho = s.Ho(), Wo = s.Wo();
  for (int64_t t = 0; t < c.tasks; ++t)
    for (int64_t n = 0; n < s.N; ++n)
      for (int64_t h = 0; h < Ho; ++h)
        for (int64_t w = 0; w < Wo; ++w)
          for (int64_t kh = 0; kh < s.KH; ++kh)
            for (int64_t kw = 0; kw < s.KW; ++kw) {
              const int64_t row = h * s.stride + kh - s.padding, column = w * s.stride + kw - s.padding;
              if (row < 0 || row >= s.H || column < 0 || column >= s.W) continue;
              for (int64_t channel = 0; channel < s.C; ++channel)
                for (int64_t o = 0; o < s.O; ++o)
                  f(static_cast<size_t>((((t * s.N + n) * s.H + row) * s.W + column) * s.C + channel),
                    static_cast<size_t>((((t * s.O + o) * s.C + channel) * s.KH + kh) * s.KW + kw),
                    static_cast<size_t>((((t * s.N + n) * Ho + h) * Wo + w) * s.O + o));
            }
}

template <typename T>
void run_case(const Case& c) {
  const Conv2dShape& s = c.shape;
  const int64_t x_size = c.tasks * s.N * s.H * s.W * s.C, weight_size = s.O * s.C * s.KH * s.KW;
  const int64_t y_size = c.tasks * s.N * s.Ho() * s.Wo() * s.O;
  const Values vx = draw<T>(x_size), vdy = draw<T>(y_size);
  const Values vweight = draw<T>(weight_size * (c.shared ? 1 : c.tasks));
  const auto own = [&](size_t i) { return c.shared ? i % static_cast<size_t>(weight_size) : i; };
  Values y(vdy.size()), dx(vx.size()), dweight(static_cast<size_t>(c.tasks * weight_size));
  for_products(c, [&](size_t i, size_t j, size_t k) {
    y[k] += vx[i] * vweight[own(j)], dx[i] += vdy[k] * vweight[own(j)], dweight[j] += vx[i] * vdy[k];
  });

  const double nan = std::nan("");
  Device<T> x(vx, c.aligned), dy(vdy, c.aligned), weight(vweight, false);
  const double tolerance = sizeof(T) == 4 ? 3e-6 : 1e-14;
  const std::string name = std::to_string(c.tasks) + " tasks, " + std::to_string(s.N) + " images " +
                           std::to_string(s.H) + " x " + std::to_string(s.W) + ", " + std::to_string(s.C) + " -> " +
                           std::to_string(s.O) + " channels, kernel " + std::to_string(s.KH) + " x " +
                           std::to_string(s.KW) + ", stride " + std::to_string(s.stride) + ", padding " +
                           std::to_string(s.padding) + ": ";
  for (const bool input : {false, true}) {
    Device<T> out(Values(input ? vx.size() : vdy.size(), nan), c.aligned);
    GatherArguments<T> args{};
    const ConvLaunch launch = cut_gather(args, s, c.tasks, input, c.aim);
    args.from = (input ? dy : x).template rows<const T>(c.tasks), args.to = out.template rows<T>(c.tasks);
    args.weight = {weight.data(), c.shared ? 0 : weight_size};
    args.from_vectors = (input ? dy : x).vectors(args.from_channels), args.to_vectors = out.vectors(args.to_channels);
    kfo::emulation::launch(convolution_kernel<T>, launch.blocks, kThreads, launch.shared_bytes, args);
    compare(out.values(), input ? dx : y, name + (input ? "dx" : "y"), tolerance);
  }
  Device<T> out(Values(dweight.size(), nan), false);
  WeightArguments<T> args{};
  const ConvLaunch launch = cut_weight(args, s, c.tasks, c.aim);
  // Scratch memory of exactly the size that the launches ask for.
  Device<T> partials(Values(static_cast<size_t>(partial_sums(args, c.tasks)), nan), true);
  args.x = x.template rows<const T>(c.tasks), args.dy = dy.template rows<const T>(c.tasks);
  args.partials = partials.data(), args.dweight = {out.data(), weight_size};
  args.x_vectors = x.vectors(s.C), args.dy_vectors = dy.vectors(s.O);
  kfo::emulation::launch(convolution_weight_kernel<T>, launch.blocks, kThreads, launch.shared_bytes, args);
  kfo::emulation::launch(convolution_weight_sum_kernel<T>, weight_sum_blocks(args, c.tasks), kThreads,
                         weight_sum_shared_bytes<T>(), args);
  compare(out.values(), dweight, name + "dweight", tolerance);
}

static int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[rng() % values.size()]; }

int main(int argc, char** argv) {
  const auto both = [](const Case& c) {
    run_case<float>(c);
    run_case<double>(c);
  };
  // Several slabs and, with an aim of one block, several tiles whose weights stay in shared memory; 16 bytes at a time.
  both({2, {3, 9, 8, 8, 12, 3, 3, 1, 1}, 1});
  // Phases, splits and edges of tiles, an element at a time.
  both({2, {5, 8, 9, 3, 5, 3, 2, 2, 1}});
  if (argc > 1 && std::strcmp(argv[1], "smallest") != 0) {
    // More weights than stay in shared memory; several tiles of rows and of columns.
    both({1, {2, 12, 11, 64, 40, 3, 3, 1, 1}, 1});
    both({1, {1, 6, 5, 33, 64, 5, 5, 2, 2}});
    // The networks' own.
    both({2, {5, 14, 14, 1, 32, 3, 3, 2, 1}});
    both({1, {25, 7, 7, 32, 32, 3, 3, 2, 1}, kConvBlocks, true});
    both({1, {5, 8, 8, 3, 32, 3, 3, 1, 1}, 1});
    // A stride beyond the kernel, and as large as the padded image; a kernel as large as the image.
    both({2, {3, 7, 8, 4, 5, 2, 1, 3, 0}, 1});
    both({1, {2, 4, 5, 3, 4, 3, 3, 9, 2}});
    both({2, {3, 5, 4, 4, 8, 5, 4, 1, 0}});
    both({0, {3, 5, 4, 4, 8, 3, 3, 1, 1}});
    both({2, {0, 5, 4, 4, 8, 3, 3, 1, 1}});
    for (int i = std::atoi(argv[1]); i > 0; --i) {
      Case c{one_of({1, 3}), {}, one_of({1, kConvBlocks}), rng() % 3 == 0, rng() % 3 != 0};
      Conv2dShape& s = c.shape;
      s.KH = one_of({1, 3, 5}), s.KW = one_of({1, 3, 5}), s.stride = one_of({1, 1, 2, 3}),
      s.padding = one_of({0, 1, 2});
      s.C = one_of({1, 3, 32, 33}), s.O = one_of({5, 32, 64});
      // As many images as their channels leave time for.
      s.N = s.C * s.O > 200 ? one_of({1, 5}) : one_of({1, 5, 25});
      s.H = s.KH + one_of({0, 1, 4, 5}), s.W = s.KW + one_of({0, 2, 3, 6});
      both(c);
    }
  }
  std::printf("%ld comparisons, worst error %.2f of the tolerance\n", checks, worst);
}
