#include "orders.h"
#include "sum.cuh"

namespace kfo::cuda {

template <typename T>
void launch_sums(const Launcher& launcher, const Launch& part, const Data<T>& data) {
  launcher.launch<sum_kernel<T>>(part.sum_blocks, kThreads * sizeof(double), Arguments<T, Table>{part.table, data});
}

template void launch_sums(const Launcher&, const Launch&, const Data<float>&);
template void launch_sums(const Launcher&, const Launch&, const Data<double>&);

}  // namespace kfo::cuda
