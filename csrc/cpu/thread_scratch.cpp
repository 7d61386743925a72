#include "thread_scratch.h"

#include "scratch_buffer.h"

namespace kfo::cpu {

namespace {

thread_local ScratchBuffer memory;

}  // namespace

void* scratch(size_t bytes) { return memory.reserve(bytes); }

void trim_scratch() { memory.trim(kKeptBytes); }

}  // namespace kfo::cpu
