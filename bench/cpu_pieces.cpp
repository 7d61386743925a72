// The pieces that the CPU kernels are made of, one by one on the calling thread. bench/cpu_pieces.py compiles this
// against the csrc/cpu of some commit and calls it. Operands stay as they are, in whatever cache holds them.
#include <functional>
#include <string>
#include <vector>

#include "../plan.h"
#include "conv2d_kernels.h"
#include "fma_kernels.h"
#include "transform_kernels.cpp"

namespace {

namespace table = kfo::cpu::KFO_ISA;

struct Piece {
  std::string name;
  double multiply_adds;  // of one call
  std::function<void()> run;
};

std::vector<Piece> pieces;
std::vector<std::vector<float>> memory;  // of the operands and results
std::vector<Job<float>> jobs;
Job<float> block_job;      // may be that of the transposed problem
constexpr int kTasks = 8;  // a thread's share of 16
kfo::cpu::Conv2dJob<float> conv;

float* numbers(int64_t count) {
  std::vector<float> out(static_cast<size_t>(count) + 16);
  uint32_t state = static_cast<uint32_t>(memory.size()) + 1;
  for (float& number : out) {
    state = state * 1664525 + 1013904223;
    number = static_cast<float>(state >> 8) / static_cast<float>(1 << 24) - 0.5f;
  }
  memory.push_back(std::move(out));
  // As torch's tensors are.
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.back().data()) + 63) / 64 * 64);
}

void start() {
  pieces.clear(), memory.clear();
  pieces.push_back({"multiply-adds in registers", 1000.0 * table::fma_kernel.flops_per_step / 2, [] {
                      [[maybe_unused]] static volatile float sink;
                      sink = table::fma_kernel.run(1000);
                    }});
}

// The pieces of the orders, for one block of `rows` matrices.
template <class Block>
void add_block(Block block, int64_t rows) {
  const Job<float>& of = block_job;
  const double right = static_cast<double>(rows * of.p * of.q * of.q), left = right / of.q * of.p;
  const std::string of_what = (rows == 1 ? ", a matrix" : ", " + std::to_string(rows) + " matrices") +
                              std::string(of.R == jobs[0].R ? "" : " (transposed)");
  const auto X = block.load(of.G), N = block.matrix(), O = block.matrix();
  const auto add = [&](const char* piece, double multiply_adds, std::function<void()> run) {
    pieces.push_back({piece + of_what, multiply_adds, std::move(run)});
  };
  add("load", 0, [=, &of] { Block(block).load(of.G); });
  add("right", right, [=, &of]() mutable { block.right(plain(of.L, of.q), X, N); });
  add("left", left, [=, &of]() mutable { block.left(plain(of.R, of.p), N, O); });
  add("left, R^T", left, [=, &of]() mutable { block.left(transposed(of.R, of.p), N, O); });
  add("store", 0, [=, &of]() mutable { block.store(O, of.Y, {}); });
  add("left gradient", left, [=, &of]() mutable { block.left_gradient(N, X, of.dR, false); });
  add("right gradient", right, [=, &of]() mutable { block.right_gradient(X, N, of.dL, false); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// The pieces of B matrices of p x q, and the three orders with every output: of one task again and again, and of
// several in turn, whose operands and results do not stay in the nearest cache. The pieces of an earlier call are gone.
EXPORT void kfo_transform_pieces(int64_t B, int64_t p, int64_t q) {
  start();
  const int64_t n = B * p * q;
  jobs.assign(kTasks, {});
  for (Job<float>& job : jobs) {
    job.B = job.end = B, job.p = p, job.q = q;
    job.R = numbers(p * p), job.L = numbers(q * q), job.ddR = numbers(p * p), job.ddL = numbers(q * q);
    job.G = {numbers(n), n}, job.dY = {numbers(n), n}, job.ddG = {numbers(n), n};
    job.Y = {numbers(n), n}, job.dG = {numbers(n), n}, job.ddY = {numbers(n), n};
    job.dR = numbers(p * p), job.dL = numbers(q * q);
  }
  const Job<float>& job = jobs[0];
  if (prefers_lanes(job)) {
    block_job = job;
    const int64_t step = lane_rows(job);
    float* working = numbers(4 * LaneBlock<float>::matrix_elements(job, step));
    add_block(LaneBlock<float>(block_job, 0, smaller(step, B), working), smaller(step, B));
  } else {
    const bool turn = q < kLanes<float> && p > q;
    block_job = turn ? transposed_job(job) : job;
    // With room for what a block keeps beside its matrices, whichever commit's it is.
    float* working = numbers(4 * RowBlock<float>::matrix_elements(block_job) + (1 << 17));
    add_block(RowBlock<float>(block_job, 0, turn, working), 1);
  }
  const auto add = [&](const std::string& name, kfo::Order order, void (*run)(const Job<float>&)) {
    const double multiply_adds = static_cast<double>(B) * kfo::flops_per_matrix({B, p, q, 0, 0, 0, 0}, order) / 2;
    pieces.push_back({name, multiply_adds, [run] { run(jobs[0]); }});
    pieces.push_back({name + ", " + std::to_string(kTasks) + " tasks in turn", kTasks * multiply_adds, [run] {
                        for (const Job<float>& job : jobs) run(job);
                      }});
  };
  const auto& orders = table::transform_kernels.float32;
  add("forward", kfo::Order::forward, orders.forward);
  add("backward", kfo::Order::backward, orders.backward);
  add("double backward", kfo::Order::double_backward, orders.double_backward);
}

// The convolution of N square images and its two gradients, with 3 x 3 kernels and a padding of 1 as all
// networks of the paper have them.
EXPORT void kfo_conv2d_pieces(int64_t N, int64_t size, int64_t channels, int64_t out, int64_t stride) {
  start();
  conv = {};
  conv.shape = {N, size, size, channels, out, 3, 3, stride, 1};
  const auto& s = conv.shape;
  const int64_t taps = 9 * channels, pixels = N * s.Ho() * s.Wo();
  conv.x = numbers(N * size * size * channels), conv.weight = numbers(out * taps), conv.dy = numbers(pixels * out);
  conv.y = numbers(pixels * out), conv.dx = numbers(N * size * size * channels), conv.dweight = numbers(out * taps);
  // Of one row of the images: an input meets every stride-th tap, from its own on.
  int64_t met = 0;
  for (int64_t i = 0; i < size; ++i) met += (3 - (i + 1) % stride + stride - 1) / stride;
  const auto add = [](const char* name, int64_t work, void (*run)(const kfo::cpu::Conv2dJob<float>&), int64_t items) {
    pieces.push_back({name, static_cast<double>(work), [run, items] {
                        conv.begin = 0, conv.end = items;
                        run(conv);
                      }});
  };
  const auto& ops = table::conv2d_kernels.float32;
  add("conv2d", pixels * out * taps, ops.forward, N);
  add("conv2d_input", N * met * met * channels * out, ops.input, N);
  add("conv2d_weight", pixels * out * taps, ops.weight, taps);
}

EXPORT int kfo_pieces() { return static_cast<int>(pieces.size()); }
EXPORT const char* kfo_piece_name(int i) { return pieces[static_cast<size_t>(i)].name.c_str(); }
EXPORT double kfo_piece_multiply_adds(int i) { return pieces[static_cast<size_t>(i)].multiply_adds; }
EXPORT void kfo_piece_run(int i, int64_t calls) {
  const auto& run = pieces[static_cast<size_t>(i)].run;
  for (int64_t call = 0; call < calls; ++call) run();
}
