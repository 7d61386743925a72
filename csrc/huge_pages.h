// Transparent huge pages for the outputs of CPU operators: fewer page faults and TLB misses over megabytes of memory.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace kfo {

// KFO_HUGE_PAGES=0 leaves memory as the system gives it.
inline bool uses_huge_pages() {
  static const bool uses = [] {
    const char* set = std::getenv("KFO_HUGE_PAGES");
    return !set || std::strcmp(set, "0") != 0;
  }();
  return uses;
}

// Advises the kernel to back a buffer by huge pages, at its next page faults. The range is rounded to whole huge pages,
// as a buffer of less than two of them has none inside; for its neighbours too this is only an advice.
inline void advise_huge_pages(const void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  constexpr size_t kLeast = size_t{256} << 10;  // below, the call costs more than it saves
  if (bytes < kLeast || !uses_huge_pages()) return;
  const auto first = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + bytes + kPage - 1) / kPage * kPage;
  // It fails where the system has no huge pages, or where part of the range is not mapped: the rest is advised.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace kfo
