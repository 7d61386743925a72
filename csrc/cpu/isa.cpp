#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kfo::cpu {

namespace {

bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool supports_avx512() { return supports_avx2() && __builtin_cpu_supports("avx512f"); }

const Isa& choose() {
  const char* forced = std::getenv("KFO_CPU_ISA");
  const std::string name = forced ? forced : "";
  if (name.empty()) return supports_avx512() ? kAvx512 : supports_avx2() ? kAvx2 : kBaseline;
  if (name == kBaseline.name) return kBaseline;
  if (name != kAvx512.name && name != kAvx2.name)
    throw std::invalid_argument("KFO_CPU_ISA: expected avx512, avx2 or baseline, got '" + name + "'");
  if (name == kAvx512.name ? !supports_avx512() : !supports_avx2())
    throw std::invalid_argument("KFO_CPU_ISA: this processor does not support '" + name + "'");
  return name == kAvx512.name ? kAvx512 : kAvx2;
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace kfo::cpu

// The name of the instruction set in use, or null when KFO_CPU_ISA asks for one that is not available.
extern "C" __attribute__((visibility("default"))) const char* kfo_cpu_isa() {
  try {
    return kfo::cpu::isa().name;
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}
