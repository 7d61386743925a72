// How the CPU library cuts a group into chunks, and how the partial gradients of factors are added up. Depends on
// shapes, tasks, order and sharing only, never on the number of threads: so does the order of every sum, and every bit
// of the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../integers.h"
#include "../plan.h"

namespace kfo::cpu {

// Rows [begin, end) of one problem. When both factors are shared, rows run on over the tasks (task is 0, and row r
// belongs to task r / B); otherwise they are rows of B of one task. partial_R and partial_L are where this chunk leaves
// its part of dR and dL, in elements of the partial buffer, or -1 where it is the only one and writes the result
// itself.
struct Chunk {
  int64_t problem, task, begin, end;
  int64_t partial_R, partial_L;
  double flops;
};

// One row of dR or dL of one problem: the sum of `count` partial results, one after the other from `first`.
struct Sum {
  int64_t problem, task;
  bool left;  // of dR, else of dL
  int64_t first, count, elements;
};

struct Schedule {
  Group group;
  std::vector<Chunk> chunks;     // the costliest first
  std::vector<int64_t> batches;  // chunks [batches[i], batches[i + 1]) are taken together
  std::vector<Sum> sums;
  int64_t partials = 0;  // elements
  double flops = 0;
};

namespace detail {

constexpr double kChunkFlops = 1.5e6;
constexpr double kBatchFlops = 1e5;
constexpr double kCallFlops = 3e3;  // what starting on a chunk costs
constexpr int64_t kRowsMultiple = 32;
constexpr int64_t kRowsAtMost = 512;  // of a chunk that adds up gradients one block after the other, while rounding
constexpr int64_t kRowMajorSide = 32, kRowMajorElements = 4096;  // from either on a matrix is worked on by itself
constexpr int64_t kPartialElements = int64_t{1} << 23;           // of one problem
constexpr double kFlopsPerPartial = 128;  // below, a chunk's partial results cost more than it computes

// Into how many chunks `rows` rows of a problem are cut, and the rows of each but the last.
inline int64_t chunk_rows(const Problem& problem, int64_t rows, Order order) {
  const double wanted = kChunkFlops / flops_per_matrix(problem, order);
  int64_t size = std::clamp<int64_t>(static_cast<int64_t>(wanted), 1, rows);
  const bool row_major = std::min(problem.p, problem.q) >= kRowMajorSide || problem.p * problem.q >= kRowMajorElements;
  if (!row_major) size = round_up(size, kRowsMultiple);
  if (order != Order::forward) {
    size = std::min(size, kRowsAtMost);
    const int64_t partial = problem.p * problem.p + problem.q * problem.q;
    const double worthwhile = kFlopsPerPartial * static_cast<double>(partial) / flops_per_matrix(problem, order);
    size = std::max({size, static_cast<int64_t>(worthwhile), ceil_div(rows, kPartialElements / partial + 1)});
  }
  return std::min(size, rows);
}

}  // namespace detail

inline Schedule make_schedule(const std::vector<int64_t>& shapes, int64_t tasks, Order order, bool shared_R,
                              bool shared_L) {
  Schedule schedule;
  schedule.group = make_group(shapes);
  const bool joined = shared_R && shared_L;
  const int64_t groups = joined ? std::min<int64_t>(tasks, 1) : tasks;
  for (size_t i = 0; i < schedule.group.problems.size(); ++i) {
    const Problem& problem = schedule.group.problems[i];
    const int64_t rows = joined ? problem.B * tasks : problem.B;
    const int64_t size = rows ? detail::chunk_rows(problem, rows, order) : 1;
    const int64_t parts = ceil_div(rows, size);
    const double flops = flops_per_matrix(problem, order);

    // The chunks of a row of a factor's gradient follow each other: of one task, or of all of them where it is shared.
    const auto sum_partials = [&](bool left, bool shared, int64_t elements) {
      const int64_t first = schedule.partials, count = shared ? groups * parts : parts;
      if (order == Order::forward || count < 2) return int64_t{-1};
      for (int64_t row = 0; row < (shared ? 1 : groups); ++row)
        schedule.sums.push_back({static_cast<int64_t>(i), row, left, first + row * count * elements, count, elements});
      schedule.partials += groups * parts * elements;
      return first;
    };
    const int64_t nR = problem.p * problem.p, nL = problem.q * problem.q;
    const int64_t first_R = sum_partials(true, shared_R, nR), first_L = sum_partials(false, shared_L, nL);

    for (int64_t task = 0; task < groups; ++task)
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t index = task * parts + part;
        const int64_t begin = part * size, end = std::min(rows, begin + size);
        schedule.chunks.push_back({static_cast<int64_t>(i), task, begin, end, first_R < 0 ? -1 : first_R + index * nR,
                                   first_L < 0 ? -1 : first_L + index * nL,
                                   flops * static_cast<double>(end - begin) + detail::kCallFlops});
        schedule.flops += schedule.chunks.back().flops;
      }
  }
  std::stable_sort(schedule.chunks.begin(), schedule.chunks.end(),
                   [](const Chunk& a, const Chunk& b) { return a.flops > b.flops; });
  double batch = detail::kBatchFlops;
  for (size_t i = 0; i < schedule.chunks.size(); ++i) {
    if (batch >= detail::kBatchFlops) {
      schedule.batches.push_back(static_cast<int64_t>(i));
      batch = 0;
    }
    batch += schedule.chunks[i].flops;
  }
  schedule.batches.push_back(static_cast<int64_t>(schedule.chunks.size()));
  return schedule;
}

// The same, remembered: an equal call later costs a look-up. Safe from any thread.
std::shared_ptr<const Schedule> schedule_of(const std::vector<int64_t>& shapes, int64_t tasks, Order order,
                                            bool shared_R, bool shared_L);

}  // namespace kfo::cpu
