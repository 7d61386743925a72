// Scratch memory of the calling thread. No inline code: it would be compiled for each instruction set.
#pragma once

#include <cstddef>

namespace kfo::cpu {

// At least `bytes`, 64-byte aligned, valid until the next call of the same thread.
void* scratch(size_t bytes);

// Frees it if it exceeds what a thread may keep between calls.
void trim_scratch();

}  // namespace kfo::cpu
