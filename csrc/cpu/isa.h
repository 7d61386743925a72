// The instruction set in use: chosen once, at the first call, from what the processor and the operating system support.
#pragma once

#include "kernels.h"

namespace kfo::cpu {

// Throws std::invalid_argument when KFO_CPU_ISA names an unknown or unsupported instruction set.
const Isa& isa();

}  // namespace kfo::cpu
