// The instruction set in use: chosen once, at the first call, from what the processor and the operating system support.
#pragma once

namespace kfo::cpu {

enum class Isa { avx512, avx2, baseline };

// Throws std::invalid_argument when KFO_CPU_ISA names an unknown or unsupported instruction set.
Isa isa();

// Of a table of kernels that was compiled once for each instruction set, the one to use.
template <class Table>
const Table& chosen(const Table& avx512, const Table& avx2, const Table& baseline) {
  const Isa in_use = isa();
  return in_use == Isa::avx512 ? avx512 : in_use == Isa::avx2 ? avx2 : baseline;
}

}  // namespace kfo::cpu
