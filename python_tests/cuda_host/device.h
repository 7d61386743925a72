// Operands of the kernels that run on the host.
#pragma once

#include <cstddef>
#include <vector>

#include "packed_rows.h"

using Values = std::vector<double>;

// A device copy, with nothing behind its end; it starts on a 16-byte boundary, or off one.
template <typename T>
struct Device {
  std::vector<T> memory;
  int offset;
  Device(const Values& values, bool aligned) : memory(values.size() + (aligned ? 0 : 1)), offset(aligned ? 0 : 1) {
    for (size_t i = 0; i < values.size(); ++i) memory[i + static_cast<size_t>(offset)] = static_cast<T>(values[i]);
  }
  T* data() { return memory.data() + offset; }
  Values values() const { return Values(memory.begin() + offset, memory.end()); }
  // A row for each task; `vectors` if 16 bytes at a time may be moved.
  template <typename Element>
  kfo::PackedRows<Element> rows(int64_t tasks) {
    return {data(), tasks ? static_cast<int64_t>(memory.size() - static_cast<size_t>(offset)) / tasks : 0};
  }
  bool vectors(int64_t channels) const { return offset == 0 && channels % (16 / int64_t{sizeof(T)}) == 0; }
};
