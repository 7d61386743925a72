// How a group is cut into launches, thread blocks and scratch memory. Plain host C++: no torch, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../integers.h"
#include "../plan.h"
#include "cut.h"
#include "table.h"
#include "tiled.h"

namespace kfo::cuda {

// Description of one call. Rows of dR and dL: 0 where they are not needed, 1 where they are summed over all tasks.
struct Request {
  Order order;
  int64_t tasks, element_size;
  int64_t dR_rows = 0, dL_rows = 0;
  bool need_G = false, need_Y = false;               // dG, ddY
  bool has_R = false, has_G = false, has_L = false;  // ddR, ddG, ddL
  Choice choice = Choice::by_size;

  Intermediates intermediates() const { return {dR_rows != 0, need_G, dL_rows != 0, need_Y, has_R, has_G, has_L}; }

  auto key() const {
    return std::tuple(order, tasks, element_size, dR_rows, dL_rows, need_G, need_Y, has_R, has_G, has_L, choice);
  }
};

// Problems whose factors fit in shared memory: the order's kernel, then the sums of what its blocks leave partial.
struct Launch {
  Table table{};
  int64_t blocks = 0;
  int64_t sum_blocks = 0;
  int64_t shared_bytes = 0;
};

// Tiles of products of the other problems.
struct TiledLaunch {
  TiledTable table{};
  int64_t blocks = 0;
};

struct Schedule {
  std::vector<Launch> launches;
  std::vector<TiledLaunch> tiled;  // in order: the intermediate products, then the results
  // ScratchBuffer memory, in elements: a packed row of intermediate products for each task, then the partial sums.
  int64_t scratch_columns = 0;
  int64_t scratch = 0;
};

namespace detail {

// What a thread block keeps in shared memory: pairs (R, L) of factors, operands or results for each of its rows of B,
// and others for each row, or where a warp computes a matrix, rooms for each warp.
struct Footprint {
  int64_t pairs, rows, others, rooms;

  int64_t bytes(Path path, const Problem& problem, int64_t n, int64_t element_size) const {
    const int64_t p = problem.p, q = problem.q;
    const int64_t R = padded_size(p, p, element_size);
    if (path == kProducts)
      return kJobBytes +
             (pairs * (R + padded_size(q, q, element_size)) + (rows + others) * padded_size(n * p, q, element_size)) *
                 element_size;
    const int64_t pitch = lane_pitch(kLaneColumns, element_size);
    // The sums of dL over warps take the place of rooms.
    const int64_t dR = kWarps * p * pitch_of(p), dL = kWarps * kWarp * pitch, own = rooms * kWarps * p * pitch;
    return (pairs * (R + kLaneColumns * pitch) + rows * n * p * pitch + dR + std::max(dL, own)) * element_size;
  }
  // Of one more row.
  int64_t row_bytes(Path path, const Problem& problem, int64_t element_size) const {
    if (path == kProducts) return (rows + others) * problem.p * pitch_of(problem.q) * element_size;
    return rows * problem.p * lane_pitch(kLaneColumns, element_size) * element_size;
  }
};

// As the kernels of the same names take it.
inline Footprint footprint(const Request& request) {
  switch (request.order) {
    case Order::forward:  // R, L; G; N
      return {1, 1, 1, 1};
    case Order::backward:  // R, L; G, dY; N or M
      return {1, 2, 1, 1};
    case Order::double_backward: {  // R, L, ddR, ddL; G, dY, ddG; M, S, N, K
      const Intermediates use = request.intermediates();
      return {1 + (request.has_R || request.has_L), 2 + request.has_G, use.M + use.S + use.N + use.K, 3};
    }
  }
  throw std::invalid_argument("order: expected forward, backward or double_backward");
}

// Whether one matrix and the factors fit. Sides above 512 never do, and would overflow 32-bit sizes.
inline bool fits(const Problem& problem, const Footprint& kept, int64_t element_size) {
  return std::max(problem.p, problem.q) <= 512 && kept.bytes(kProducts, problem, 1, element_size) <= kSharedBytes;
}

// How many chunks B is cut into. A chunk costs about `cost`, and has no fewer elements than the partial sums that its
// block writes, so that scratch memory stays in proportion to G, as far as shared memory allows.
inline int64_t chunk_count(const Problem& problem, const Footprint& kept, const Request& request, double cost) {
  const int64_t p = problem.p, q = problem.q, matrix = p * q;
  const Path path = path_of(p, q, request.element_size, request.choice);
  const int64_t partials = (request.dR_rows ? p * p : 0) + (request.dL_rows ? q * q : 0);
  const auto wanted = static_cast<int64_t>(cost / flops_per_matrix(problem, request.order));
  const int64_t enough =
      std::min<int64_t>(std::max<int64_t>(ceil_div(partials, matrix), path == kLanes ? kWarps : 1), problem.B);
  int64_t rows = std::clamp(wanted, enough, problem.B);
  const int64_t least = kept.bytes(path, problem, 1, request.element_size);
  const int64_t limit = std::clamp(kept.bytes(path, problem, enough, request.element_size),
                                   std::max(kPreferredSharedBytes, least), kSharedBytes);
  const int64_t row_bytes = kept.row_bytes(path, problem, request.element_size);
  rows = std::min(rows, 1 + (limit - least) / row_bytes);
  // The last vectors' padding; then as many matrices for each warp.
  while (rows > 1 && kept.bytes(path, problem, rows, request.element_size) > limit) --rows;
  if (path == kLanes && rows > kWarps) rows -= rows % kWarps;
  return ceil_div(problem.B, rows);
}

// The cost of a block, in operations: that of an even share for two blocks on each multiprocessor of a large GPU, but
// enough to outweigh the start of a block. Never the number of this GPU's multiprocessors: sums would depend on it.
inline double block_cost(const std::vector<Problem>& problems, const Request& request) {
  constexpr double blocks = 264, least = 1 << 17;
  double total = 0;
  for (const Problem& problem : problems)
    total += static_cast<double>(problem.B) * flops_per_matrix(problem, request.order);
  return std::max(least, total * static_cast<double>(request.tasks) / blocks);
}

inline int32_t block_index(int64_t blocks, int64_t tasks) {
  if (blocks > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("shapes: " + std::to_string(tasks) +
                                " tasks of this group need more thread blocks than a launch may have");
  return static_cast<int32_t>(blocks);
}

inline void schedule_blocks(Schedule& schedule, const std::vector<Problem>& problems, const Footprint& kept,
                            const Request& request) {
  const double cost = block_cost(problems, request);
  struct Cut {
    Problem problem;
    int64_t chunks;
    double cost;  // of a block
  };
  std::vector<Cut> cuts;
  for (const Problem& problem : problems) {
    const int64_t chunks = chunk_count(problem, kept, request, cost);
    const auto rows = static_cast<double>(ceil_div(problem.B, chunks));
    cuts.push_back({problem, chunks, rows * flops_per_matrix(problem, request.order)});
  }
  // Blocks start in order: the costliest first, so that none of them is left over at the end.
  std::stable_sort(cuts.begin(), cuts.end(), [](const Cut& a, const Cut& b) { return a.cost > b.cost; });

  for (const auto& [problem, chunks, _] : cuts) {
    if (schedule.launches.empty() || schedule.launches.back().table.count == kTableProblems) {
      schedule.launches.emplace_back();
      Table& table = schedule.launches.back().table;
      std::fill_n(table.first_block, kTableProblems, std::numeric_limits<int32_t>::max());
      std::fill_n(table.first_sum_block, kTableProblems, std::numeric_limits<int32_t>::max());
      table.tasks = request.tasks;
      table.dR_rows = request.dR_rows;
      table.dL_rows = request.dL_rows;
    }
    Launch& launch = schedule.launches.back();
    Table& table = launch.table;
    table.first_block[table.count] = block_index(launch.blocks, request.tasks);
    table.first_sum_block[table.count] = block_index(launch.sum_blocks, request.tasks);
    Entry& entry = table.entries[table.count++];
    entry.R = problem.R;
    entry.G = problem.G;
    entry.L = problem.L;
    entry.bias = problem.bias;
    entry.partials = schedule.scratch;
    const Path path = path_of(problem.p, problem.q, request.element_size, request.choice);
    cut(entry, path, problem.B, problem.p, problem.q, block_index(chunks, request.tasks));
    launch.blocks += request.tasks * chunks;
    const int64_t size = table.partials_size(entry);
    // Outputs that a single block completes leave nothing to sum.
    const bool sums = (request.dR_rows && !table.is_complete(entry, request.dR_rows)) ||
                      (request.dL_rows && !table.is_complete(entry, request.dL_rows));
    if (sums) {
      schedule.scratch += request.tasks * chunks * size;
      const int64_t row_blocks = ceil_div<int64_t>(size, kSumColumns);
      entry.by_sum_blocks = Divisor(static_cast<uint32_t>(row_blocks));
      launch.sum_blocks += row_blocks * std::max(request.dR_rows, request.dL_rows);
    }
    launch.shared_bytes =
        std::max(launch.shared_bytes, kept.bytes(path, problem, ceil_div(problem.B, chunks), request.element_size));
    block_index(std::max(launch.blocks, launch.sum_blocks), request.tasks);
  }
}

// The products of one large problem, as matrices in packed rows. `scratch`: where its intermediates begin.
class LargeProblem {
 public:
  LargeProblem(const Problem& problem, int64_t scratch) : problem_(problem), scratch_(scratch) {}

  TiledMatrix left(Source source) const { return {source, side(problem_.p), 1, problem_.R, 0}; }
  TiledMatrix right(Source source) const { return {source, side(problem_.q), 1, problem_.L, 0}; }
  TiledMatrix rows(Source source) const { return {source, side(problem_.q), 1, problem_.G, matrix()}; }
  // The index-th intermediate, (B, p, q) for each task.
  TiledMatrix intermediate(int index) const {
    return {kIntermediates, side(problem_.q), 1, scratch_ + index * problem_.B * matrix(), matrix()};
  }

  // Results of p x q for each b: an intermediate or an output.
  TiledProduct make(int index, TiledTerm X, TiledTerm Y = {}) const {
    return product(kScratch, false, problem_.p, problem_.q, intermediate(index).offset, 0, X, Y);
  }
  TiledProduct write(Target target, TiledTerm X, TiledTerm Y = {}) const {
    TiledProduct made = product(target, false, problem_.p, problem_.q, problem_.G, 0, X, Y);
    if (target == kY) made.bias = problem_.bias;
    return made;
  }
  TiledProduct sum_R(int64_t output_rows, TiledTerm X) const {
    return product(kdR, true, problem_.p, problem_.p, problem_.R, output_rows, X, {});
  }
  TiledProduct sum_L(int64_t output_rows, TiledTerm X, TiledTerm Y = {}) const {
    return product(kdL, true, problem_.q, problem_.q, problem_.L, output_rows, X, Y);
  }

 private:
  const Problem& problem_;
  int64_t scratch_;

  static int32_t side(int64_t size) { return static_cast<int32_t>(size); }
  int64_t matrix() const { return problem_.p * problem_.q; }

  TiledProduct product(Target target, bool sum, int64_t rows, int64_t cols, int64_t offset, int64_t output_rows,
                       TiledTerm X, TiledTerm Y) const {
    if (X.depth == 0) std::swap(X, Y);
    // Tiles of 8 rows or columns waste less than half of one of 64 up to here.
    const TileShape shape = rows <= 16 ? TileShape::wide : cols <= 16 ? TileShape::tall : TileShape::square;
    return {X,  Y,          target,      shape, sum, side(rows), side(cols), offset, sum ? 0 : matrix(),
            -1, problem_.B, output_rows, 0};
  }
};

inline TiledMatrix transposed(const TiledMatrix& matrix) {
  return {matrix.source, matrix.col, matrix.row, matrix.offset, matrix.batch};
}

// A term, or none if an operand is absent. The depth is the length of A's rows.
inline TiledTerm term(bool present, const TiledMatrix& A, const TiledMatrix& B, int64_t depth) {
  return present ? TiledTerm{A, B, static_cast<int32_t>(depth)} : TiledTerm{};
}

struct Phases {
  std::vector<TiledProduct> intermediates, results;
};

// The formulas of the three orders, as in the kernels of the same names. Returns how many intermediates they keep.
inline int add_products(Phases& phases, const Problem& problem, int64_t scratch, const Request& request) {
  const LargeProblem x(problem, scratch);
  const int64_t p = problem.p, q = problem.q;
  const TiledMatrix R = x.left(kR), L = x.right(kL), G = x.rows(kG), dY = x.rows(kdY);
  const TiledMatrix ddR = x.left(kddR), ddL = x.right(kddL), ddG = x.rows(kddG);
  auto& made = phases.intermediates;
  auto& out = phases.results;
  const bool need_R = request.dR_rows, need_L = request.dL_rows;

  if (request.order == Order::forward) {
    const TiledMatrix N = x.intermediate(0);
    made.push_back(x.make(0, term(true, G, L, q)));
    out.push_back(x.write(kY, term(true, transposed(R), N, p)));
    return 1;
  }
  if (request.order == Order::backward) {
    const TiledMatrix M = x.intermediate(0), N = x.intermediate(1);
    if (request.need_G || need_L) made.push_back(x.make(0, term(true, R, dY, p)));
    if (need_R) made.push_back(x.make(1, term(true, G, L, q)));
    if (need_R) out.push_back(x.sum_R(request.dR_rows, term(true, N, transposed(dY), q)));
    if (need_L) out.push_back(x.sum_L(request.dL_rows, term(true, transposed(G), M, p)));
    if (request.need_G) out.push_back(x.write(kdG, term(true, M, transposed(L), q)));
    return 2;
  }
  const TiledMatrix M = x.intermediate(0), S = x.intermediate(1), N = x.intermediate(2), K = x.intermediate(3);
  const bool has_R = request.has_R, has_G = request.has_G, has_L = request.has_L, has_K = has_G || has_L;
  const Intermediates use = request.intermediates();
  if (use.M) made.push_back(x.make(0, term(true, R, dY, p)));
  if (use.S) made.push_back(x.make(1, term(true, ddR, dY, p)));
  if (use.N) made.push_back(x.make(2, term(true, G, L, q)));
  if (use.K) made.push_back(x.make(3, term(has_G, ddG, L, q), term(has_L, G, ddL, q)));
  if (need_R) out.push_back(x.sum_R(request.dR_rows, term(has_K, K, transposed(dY), q)));
  if (need_L)
    out.push_back(x.sum_L(request.dL_rows, term(has_R, transposed(G), S, p), term(has_G, transposed(ddG), M, p)));
  if (request.need_G) out.push_back(x.write(kdG, term(has_R, S, transposed(L), q), term(has_L, M, transposed(ddL), q)));
  if (request.need_Y)
    out.push_back(x.write(kddY, term(has_R, transposed(ddR), N, p), term(has_K, transposed(R), K, p)));
  return 4;
}

inline void schedule_tiles(Schedule& schedule, const std::vector<TiledProduct>& products, const Request& request) {
  bool fresh = true;  // a phase begins with a launch of its own: it reads what the one before wrote
  for (const TiledProduct& product : products) {
    if (fresh || schedule.tiled.back().table.count == kTiledProducts) {
      schedule.tiled.emplace_back();
      schedule.tiled.back().table.tasks = request.tasks;
      fresh = false;
    }
    TiledLaunch& launch = schedule.tiled.back();
    TiledProduct& added = launch.table.products[launch.table.count++] = product;
    added.first_block = block_index(launch.blocks, request.tasks);
    const TileSize size = tile_size(product.shape);
    const int64_t tiles = ceil_div<int64_t>(product.rows, size.rows) * ceil_div<int64_t>(product.cols, size.cols);
    launch.blocks += tiles * (product.sum ? product.output_rows : request.tasks * product.B);
    block_index(launch.blocks, request.tasks);
  }
}

}  // namespace detail

inline Schedule make_schedule(const Group& group, const Request& request) {
  const detail::Footprint kept = detail::footprint(request);
  Schedule schedule;
  std::vector<Problem> small;
  detail::Phases phases;
  for (const Problem& problem : group.problems) {
    if (detail::fits(problem, kept, request.element_size)) {
      small.push_back(problem);
      continue;
    }
    if (std::max(problem.p, problem.q) > std::numeric_limits<int32_t>::max())
      throw std::invalid_argument("shapes: p and q must be less than 2^31, got " +
                                  shape_text({problem.B, problem.p, problem.q}));
    const int kept_products = detail::add_products(phases, problem, schedule.scratch_columns, request);
    schedule.scratch_columns += kept_products * problem.B * problem.p * problem.q;
  }
  schedule.scratch = schedule.scratch_columns * request.tasks;
  detail::schedule_blocks(schedule, small, kept, request);
  detail::schedule_tiles(schedule, phases.intermediates, request);
  detail::schedule_tiles(schedule, phases.results, request);
  return schedule;
}

}  // namespace kfo::cuda
