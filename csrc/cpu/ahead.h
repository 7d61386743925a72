// Memory that will be used soon, asked for a few cache lines at a time while a product computes: the arithmetic of one
// job then hides the way that the operands of the next one have to come.
#pragma once

#include <cstdint>

namespace kfo::cpu {

// Ranges still to be asked for, first to last.
struct Ahead {
  static constexpr int kLine = 64;    // bytes of a line of the cache
  static constexpr int kRanges = 12;  // five results of a job, seven operands of the next
  struct Range {
    const char *next, *end;
  };
  Range ranges[kRanges];
  int first = 0, count = 0;
  int64_t lines = 16;  // at a time

  void plan(const void* data, int64_t bytes) {
    const auto* begin = static_cast<const char*>(data);
    ranges[count++] = {begin, begin + bytes};
  }
};

}  // namespace kfo::cpu

namespace {

// Asks for the next few lines. A prefetch never faults, and of a line that is there already it costs next to nothing.
// A function of its own: it stands before the loops of every tile, and would be copied into each of them.
__attribute__((noinline)) inline void fetch_ahead(kfo::cpu::Ahead* ahead) {
  if (!ahead) return;
  for (int64_t lines = ahead->lines; ahead->first < ahead->count; ++ahead->first) {
    auto& range = ahead->ranges[ahead->first];
    for (; lines > 0 && range.next < range.end; range.next += kfo::cpu::Ahead::kLine, --lines)
      __builtin_prefetch(range.next, 0, 2);
    if (range.next < range.end) return;
  }
}

}  // namespace
