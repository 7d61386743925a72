#include "working_memory.h"

#include "scratch.h"

namespace kfo::cpu {

namespace {

thread_local Scratch memory;

}  // namespace

void* scratch(size_t bytes) { return memory.reserve(bytes); }

void trim_scratch() { memory.trim(kKeptBytes); }

}  // namespace kfo::cpu
