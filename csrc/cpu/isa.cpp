#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kfo::cpu {

namespace {

bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool supports_avx512() { return supports_avx2() && __builtin_cpu_supports("avx512f"); }

constexpr const char* kNames[] = {"avx512", "avx2", "baseline"};

Isa choose() {
  const char* forced = std::getenv("KFO_CPU_ISA");
  const std::string name = forced ? forced : "";
  if (name.empty()) return supports_avx512() ? Isa::avx512 : supports_avx2() ? Isa::avx2 : Isa::baseline;
  const bool supported[] = {supports_avx512(), supports_avx2(), true};
  for (int i = 0; i < 3; ++i)
    if (name == kNames[i]) {
      if (!supported[i]) throw std::invalid_argument("KFO_CPU_ISA: this processor does not support '" + name + "'");
      return static_cast<Isa>(i);
    }
  throw std::invalid_argument("KFO_CPU_ISA: expected avx512, avx2 or baseline, got '" + name + "'");
}

}  // namespace

Isa isa() {
  static const Isa in_use = choose();
  return in_use;
}

}  // namespace kfo::cpu

// The name of the instruction set in use, or null when KFO_CPU_ISA names one that is not available.
extern "C" __attribute__((visibility("default"))) const char* kfo_cpu_isa() {
  try {
    return kfo::cpu::kNames[static_cast<int>(kfo::cpu::isa())];
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}
