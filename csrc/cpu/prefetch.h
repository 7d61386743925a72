// Software prefetch queue: each tile prefetches a few cache lines of the next job's operands, so that the arithmetic of
// one job hides the memory latency of the next.
#pragma once

#include <cstdint>

namespace kfo::cpu {

// Memory ranges still to be prefetched, first to last.
struct PrefetchQueue {
  static constexpr int kLine = 64;    // bytes of a cache line
  static constexpr int kRanges = 12;  // five results of a job, seven operands of the next
  struct Range {
    const char *next, *end;
  };
  Range ranges[kRanges];
  int first = 0, count = 0;
  int64_t lines = 16;  // prefetched at a time

  void plan(const void* data, int64_t bytes) {
    const auto* begin = static_cast<const char*>(data);
    ranges[count++] = {begin, begin + bytes};
  }
};

}  // namespace kfo::cpu

namespace {

// Asks for the next few lines. A prefetch never faults, and of a line that is there already it costs next to nothing.
// A function of its own: it stands before the loops of every tile, and would be copied into each of them.
__attribute__((noinline)) inline void prefetch_next(kfo::cpu::PrefetchQueue* prefetch) {
  if (!prefetch) return;
  for (int64_t lines = prefetch->lines; prefetch->first < prefetch->count; ++prefetch->first) {
    auto& range = prefetch->ranges[prefetch->first];
    for (; lines > 0 && range.next < range.end; range.next += kfo::cpu::PrefetchQueue::kLine, --lines)
      __builtin_prefetch(range.next, 0, 2);
    if (range.next < range.end) return;
  }
}

}  // namespace
