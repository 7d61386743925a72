// Stands in for the CUDA header of this name: a copy lands as late as it may, when the thread waits for the
// group that a commit closed it in.
#pragma once

#include <cstddef>

#include "host_device.h"

// The last `zeros` bytes are not read.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  kfo::emulation::copy_later(to, from, bytes, zeros);
}

inline void __pipeline_commit() { kfo::emulation::commit_copies(); }

inline void __pipeline_wait_prior(unsigned groups) { kfo::emulation::complete_copies(groups); }
