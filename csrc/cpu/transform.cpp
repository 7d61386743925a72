// The three transform ops on the CPU: checks, outputs, chunks over threads, and their registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../check_transform.h"
#include "../tensors.h"
#include "isa.h"
#include "parallel.h"
#include "prefetch.h"
#include "schedule.h"
#include "scratch_buffer.h"
#include "transform_kernels.h"

namespace kfo::cpu {

namespace {

constexpr int64_t kParallelSums = 1 << 16;  // elements

thread_local ScratchBuffer partial_memory;

// Operands and results of a call as bare pointers. Null data: absent, or not wanted.
template <class T>
struct Call {
  PackedRows<const T> R, G, L, bias, dY, ddR, ddG, ddL;
  T *Y = nullptr, *dG = nullptr, *ddY = nullptr;
  T *dR = nullptr, *dL = nullptr;
  int64_t dR_stride = 0, dL_stride = 0;
};

template <class T>
Job<T> job_of(const Call<T>& call, const Schedule& schedule, const Chunk& chunk, T* partials) {
  const Problem& problem = schedule.group.problems[static_cast<size_t>(chunk.problem)];
  const auto row = [&](const PackedRows<const T>& operand, int64_t offset) -> const T* {
    return operand.data ? operand.data + chunk.task * operand.stride + offset : nullptr;
  };
  const auto matrices = [&](const PackedRows<const T>& operand, int64_t offset) -> Matrices<const T> {
    return {row(operand, offset), operand.stride};
  };
  const auto result = [&](T* data) -> Matrices<T> {
    const int64_t stride = schedule.group.G;
    return {data ? data + chunk.task * stride + problem.G : nullptr, stride};
  };
  const auto gradient = [&](T* data, int64_t stride, int64_t offset, int64_t partial) -> T* {
    if (!data) return nullptr;
    return partial >= 0 ? partials + partial : data + chunk.task * stride + offset;
  };
  Job<T> job;
  job.B = problem.B, job.p = problem.p, job.q = problem.q;
  job.begin = chunk.begin, job.end = chunk.end;
  job.R = row(call.R, problem.R), job.L = row(call.L, problem.L);
  job.ddR = row(call.ddR, problem.R), job.ddL = row(call.ddL, problem.L);
  job.G = matrices(call.G, problem.G), job.dY = matrices(call.dY, problem.G), job.ddG = matrices(call.ddG, problem.G);
  job.bias = matrices(call.bias, problem.bias);
  job.Y = result(call.Y), job.dG = result(call.dG), job.ddY = result(call.ddY);
  job.dR = gradient(call.dR, call.dR_stride, problem.R, chunk.partial_R);
  job.dL = gradient(call.dL, call.dL_stride, problem.L, chunk.partial_L);
  return job;
}

// What a job still has to write, and what the one after it will read.
template <class T>
PrefetchQueue plan_prefetch(const Job<T>& job, const Job<T>& following) {
  constexpr int64_t kLeast = 2048, kMost = 65536;  // bytes: fewer come quickly enough, more would push each other out
  PrefetchQueue prefetch;
  const auto plan = [&](const T* data, int64_t elements) {
    const int64_t bytes = elements * static_cast<int64_t>(sizeof(T));
    if (data && bytes >= kLeast) prefetch.plan(data, std::min(bytes, kMost));
  };
  const auto plan_rows = [&](const Job<T>& of, const auto& matrices) {
    if (!matrices.data) return;
    const int64_t size = of.p * of.q, first = of.begin % of.B;
    plan(matrices.data + of.begin / of.B * matrices.task_stride + first * size,
         std::min(of.end - of.begin, of.B - first) * size);
  };
  for (const auto& result : {job.Y, job.dG, job.ddY}) plan_rows(job, result);
  plan(job.dR, job.p * job.p);
  plan(job.dL, job.q * job.q);
  for (const auto& operand : {following.G, following.dY, following.ddG}) plan_rows(following, operand);
  for (const T* left : {following.R, following.ddR}) plan(left, following.p * following.p);
  for (const T* right : {following.L, following.ddL}) plan(right, following.q * following.q);
  return prefetch;
}

template <class T>
void run_chunks(const Call<T>& call, const Schedule& schedule, void (*kernel)(const Job<T>&), T* partials) {
  const auto first_of = [&](int64_t batch) {
    return schedule.batches[std::min(static_cast<size_t>(batch), schedule.batches.size() - 1)];
  };
  const auto chunk_job = [&](int64_t i) {
    return i < static_cast<int64_t>(schedule.chunks.size())
               ? job_of(call, schedule, schedule.chunks[static_cast<size_t>(i)], partials)
               : Job<T>{};
  };
  const int64_t batches = static_cast<int64_t>(schedule.batches.size()) - 1;
  run_in_parallel(batches, schedule.flops >= kParallelFlops, [&](int64_t batch, int64_t following) {
    const int64_t end = first_of(batch + 1);
    Job<T> job = chunk_job(first_of(batch));
    for (int64_t i = first_of(batch); i < end; ++i) {
      const Job<T> next = chunk_job(i + 1 < end ? i + 1 : first_of(following));
      PrefetchQueue prefetch = plan_prefetch(job, next);
      job.prefetch = &prefetch;
      kernel(job);
      job = next;
    }
  });
}

// out = the sum of `count` rows of `length` elements, `row` apart: of pairs, pairs of those sums and so on, so that the
// error grows with the logarithm of their number.
template <class T>
void sum_pairwise(const T* part, int64_t count, int64_t row, int64_t length, T* out) {
  constexpr int64_t kSlice = 256;
  constexpr int kDepth = 64;
  alignas(64) T sums[kDepth][kSlice];  // not yet paired, the later ones of fewer rows
  for (int64_t first = 0; first < length; first += kSlice) {
    const int64_t size = std::min(kSlice, length - first);
    const auto add = [size](const T* from, T* to) {
      for (int64_t n = 0; n < size; ++n) to[n] += from[n];
    };
    int depth = 0;
    for (int64_t k = 0; k < count; ++k) {
      const T* from = part + k * row + first;
      if (k % 2 == 0)
        std::copy(from, from + size, sums[depth++]);
      else
        add(from, sums[depth - 1]);
      for (int64_t done = k + 1; done % 4 == 0; done /= 2) --depth, add(sums[depth], sums[depth - 1]);
    }
    for (; depth > 1; --depth) add(sums[depth - 1], sums[depth - 2]);
    std::copy(sums[0], sums[0] + size, out + first);
  }
}

template <class T>
void add_partials(const Call<T>& call, const Schedule& schedule, const T* partials) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Sum& sum = schedule.sums[static_cast<size_t>(i)];
      const Problem& problem = schedule.group.problems[static_cast<size_t>(sum.problem)];
      T* out = sum.left ? call.dR : call.dL;
      if (!out) continue;
      out += sum.left ? sum.task * call.dR_stride + problem.R : sum.task * call.dL_stride + problem.L;
      sum_pairwise(partials + sum.first, sum.count, sum.elements, sum.elements, out);
    }
  };
  const auto sums = static_cast<int64_t>(schedule.sums.size());
  if (schedule.partials < kParallelSums)
    run(0, sums);
  else
    torch::stable::parallel_for(0, sums, 1, run);
}

template <class T>
void execute(const Call<T>& call, const Schedule& schedule, void (*kernel)(const Job<T>&)) {
  T* partials = nullptr;
  const bool sums = schedule.partials > 0 && (call.dR || call.dL);
  if (sums) partials = static_cast<T*>(partial_memory.reserve(static_cast<size_t>(schedule.partials) * sizeof(T)));
  run_chunks(call, schedule, kernel, partials);
  if (sums) add_partials(call, schedule, partials);
  partial_memory.trim(kKeptBytes);
}

// The gradient of a factor, which is zero when it is shared by no tasks at all.
Tensor gradient_output(const Tensor& factor, bool need, int64_t tasks) {
  Tensor out = new_output(factor, need, {factor.size(0), factor.size(1)});
  if (need && tasks == 0) torch::stable::zero_(out);
  return out;
}

const TransformKernels& chosen_kernels() {
  return chosen(avx512::transform_kernels, avx2::transform_kernels, baseline::transform_kernels);
}

Tensor transform(const Tensor& R, const Tensor& G, const Tensor& L, const std::vector<int64_t>& shapes,
                 const std::optional<Tensor>& bias) {
  const TransformKernels& kernels = chosen_kernels();
  const int64_t tasks = check_transform(make_group(shapes), shapes, R, G, L, bias);
  const auto schedule = schedule_of(shapes, tasks, Order::forward, R.size(0) == 1, L.size(0) == 1);
  const Input in_R(R), in_G(G), in_L(L), in_bias(bias);
  Tensor Y = new_tensor(G, {tasks, schedule->group.G});
  with_type(G, [&](auto type) {
    using T = decltype(type);
    Call<T> call;
    call.R = in_R.rows<T>(), call.G = in_G.rows<T>(), call.L = in_L.rows<T>(), call.bias = in_bias.rows<T>();
    call.Y = written<T>(Y);
    execute(call, *schedule, kernels.of<T>().forward);
  });
  return Y;
}

std::tuple<Tensor, Tensor, Tensor> transform_backward(const Tensor& R, const Tensor& G, const Tensor& L,
                                                      const Tensor& dY, const std::vector<int64_t>& shapes,
                                                      const std::vector<bool>& need) {
  const TransformKernels& kernels = chosen_kernels();
  const int64_t tasks = check_transform_backward(make_group(shapes), shapes, R, G, L, dY, need);
  const auto schedule = schedule_of(shapes, tasks, Order::backward, R.size(0) == 1, L.size(0) == 1);
  const Input in_R(R), in_G(G), in_L(L), in_dY(dY);
  Tensor dR = gradient_output(R, need[0], tasks);
  Tensor dG = new_output(G, need[1], {tasks, schedule->group.G});
  Tensor dL = gradient_output(L, need[2], tasks);
  with_type(G, [&](auto type) {
    using T = decltype(type);
    Call<T> call;
    call.R = in_R.rows<T>(), call.G = in_G.rows<T>(), call.L = in_L.rows<T>(), call.dY = in_dY.rows<T>();
    call.dR = written<T>(dR), call.dG = written<T>(dG), call.dL = written<T>(dL);
    call.dR_stride = schedule->group.R, call.dL_stride = schedule->group.L;
    execute(call, *schedule, kernels.of<T>().backward);
  });
  return {dR, dG, dL};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> transform_double_backward(const Tensor& R, const Tensor& G, const Tensor& L,
                                                                     const Tensor& dY, const std::optional<Tensor>& ddR,
                                                                     const std::optional<Tensor>& ddG,
                                                                     const std::optional<Tensor>& ddL,
                                                                     const std::vector<int64_t>& shapes,
                                                                     const std::vector<bool>& need) {
  const TransformKernels& kernels = chosen_kernels();
  const int64_t tasks = check_transform_double_backward(make_group(shapes), shapes, R, G, L, dY, ddR, ddG, ddL, need);
  const auto schedule = schedule_of(shapes, tasks, Order::double_backward, R.size(0) == 1, L.size(0) == 1);
  const Input in_R(R), in_G(G), in_L(L), in_dY(dY);
  const Input in_ddR(ddR), in_ddG(ddG), in_ddL(ddL);
  Tensor dR = gradient_output(R, need[0], tasks);
  Tensor dG = new_output(G, need[1], {tasks, schedule->group.G});
  Tensor dL = gradient_output(L, need[2], tasks);
  Tensor ddY = new_output(G, need[3], {tasks, schedule->group.G});
  with_type(G, [&](auto type) {
    using T = decltype(type);
    Call<T> call;
    call.R = in_R.rows<T>(), call.G = in_G.rows<T>(), call.L = in_L.rows<T>(), call.dY = in_dY.rows<T>();
    call.ddR = in_ddR.rows<T>(), call.ddG = in_ddG.rows<T>(), call.ddL = in_ddL.rows<T>();
    call.dR = written<T>(dR), call.dG = written<T>(dG), call.dL = written<T>(dL);
    call.ddY = written<T>(ddY);
    call.dR_stride = schedule->group.R, call.dL_stride = schedule->group.L;
    execute(call, *schedule, kernels.of<T>().double_backward);
  });
  return {dR, dG, dL, ddY};
}

}  // namespace

}  // namespace kfo::cpu

STABLE_TORCH_LIBRARY_IMPL(kfo_ext, CPU, m) {
  m.impl("transform", TORCH_BOX(&kfo::cpu::transform));
  m.impl("transform_backward", TORCH_BOX(&kfo::cpu::transform_backward));
  m.impl("transform_double_backward", TORCH_BOX(&kfo::cpu::transform_double_backward));
}
