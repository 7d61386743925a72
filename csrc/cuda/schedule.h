// How a group is cut into launches, thread blocks and scratch memory. Plain host C++: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../plan.h"
#include "table.h"

namespace kfo::cuda {

struct Launch {
  Table table{};
  int64_t blocks = 0;      // of the order's kernel
  int64_t sum_blocks = 0;  // of the kernel that sums the partial dR and dL
  int64_t shared_bytes = 0;
};

struct Schedule {
  std::vector<Launch> launches;
  int64_t scratch = 0;  // elements
};

namespace detail {

// What a thread block keeps: pairs (R, L) of factors, and intermediate results of p x q for each of its rows of B.
struct Footprint {
  int64_t factor_pairs, intermediates;
};

inline Footprint footprint(Order order) {
  switch (order) {
    case Order::forward:  // R, L; N
      return {1, 1};
    case Order::backward:  // R, L; M, N
      return {1, 2};
    case Order::double_backward:  // R, L, ddR, ddL; M, S, N, K
      return {2, 4};
  }
  throw std::invalid_argument("order: expected forward, backward or double_backward");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How many chunks B is cut into. A chunk has work for every thread of a block, and no fewer elements than the partial
// sums that the block writes, so that scratch memory stays in proportion to G.
inline int64_t chunk_count(const Problem& problem, int64_t partials_size) {
  constexpr int64_t elements_per_thread = 4;
  const int64_t elements = std::max(elements_per_thread * kThreads, partials_size);
  return problem.B / std::clamp<int64_t>(ceil_div(elements, problem.p * problem.q), 1, problem.B);
}

}  // namespace detail

// The launches of one order. dR_rows and dL_rows: rows of those outputs, 0 where they are not needed.
inline Schedule make_schedule(const Group& group, int64_t tasks, Order order, int64_t element_size, int64_t dR_rows,
                              int64_t dL_rows) {
  const detail::Footprint kept = detail::footprint(order);
  Schedule schedule;
  for (const Problem& problem : group.problems) {
    if (schedule.launches.empty() || schedule.launches.back().table.count == kTableProblems) {
      schedule.launches.emplace_back();
      Table& table = schedule.launches.back().table;
      table.tasks = tasks;
      table.dR_rows = dR_rows;
      table.dL_rows = dL_rows;
    }
    Launch& launch = schedule.launches.back();
    Entry& entry = launch.table.entries[launch.table.count++];
    const int64_t p = problem.p, q = problem.q;
    entry.problem = problem;
    entry.partials_size = (dR_rows ? p * p : 0) + (dL_rows ? q * q : 0);
    entry.chunks = detail::chunk_count(problem, entry.partials_size);
    entry.intermediates_size = kept.intermediates * detail::ceil_div(problem.B, entry.chunks) * p * q;

    const int64_t blocks = tasks * entry.chunks;
    entry.first_block = launch.blocks;
    launch.blocks += blocks;
    entry.first_sum_block = launch.sum_blocks;
    launch.sum_blocks += detail::ceil_div(entry.partials_size, kThreads) * std::max(dR_rows, dL_rows);

    const int64_t capacity = kSharedBytes / element_size, factors = kept.factor_pairs * (p * p + q * q);
    entry.staged = factors <= capacity;
    int64_t shared = entry.staged ? factors : 0;
    if (shared + entry.intermediates_size <= capacity) {
      entry.intermediates = -1;
      shared += entry.intermediates_size;
    } else {
      entry.intermediates = schedule.scratch;
      schedule.scratch += blocks * entry.intermediates_size;
    }
    launch.shared_bytes = std::max(launch.shared_bytes, shared * element_size);
    entry.partials = schedule.scratch;
    schedule.scratch += blocks * entry.partials_size;
  }
  for (const Launch& launch : schedule.launches)
    if (std::max(launch.blocks, launch.sum_blocks) > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("shapes: " + std::to_string(tasks) +
                                  " tasks of this group need more thread blocks than a launch may have");
  return schedule;
}

}  // namespace kfo::cuda
