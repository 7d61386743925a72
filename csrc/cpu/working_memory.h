// The working memory that kernels ask the library for. No inline code: it would be compiled for each instruction set.
#pragma once

#include <cstddef>

namespace kfo::cpu {

// Working memory of the calling thread, 64-byte aligned, valid until its next call.
void* scratch(size_t bytes);

// Gives it back where it is more than a thread should hold on to between calls.
void trim_scratch();

}  // namespace kfo::cpu
