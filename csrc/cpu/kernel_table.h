// A table of kernels for each type of element. No torch here.
#pragma once

namespace kfo::cpu {

template <template <class> class Table>
struct KernelTable {
  Table<float> float32;
  Table<double> float64;

  template <class T>
  const Table<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return float32;
    else
      return float64;
  }
};

}  // namespace kfo::cpu
