// The kernels of one instruction set: compiled once for each, with KFO_ISA naming the namespace of the table it
// defines. Everything else in this file has internal linkage, so that no code for a newer processor can be shared with
// an older one by the linker.
#include "transform_kernels.h"

#include "orders.h"
#include "thread_scratch.h"

namespace {

using kfo::cpu::OrderKernels;
using kfo::cpu::scratch;

// The job of the transposed problem: Y^T = L^T G^T R.
template <class T>
Job<T> transposed_job(Job<T> job) {
  const Job<T> original = job;
  job.p = original.q, job.q = original.p;
  job.R = original.L, job.L = original.R;
  job.ddR = original.ddL, job.ddL = original.ddR;
  job.dR = original.dL, job.dL = original.dR;
  return job;
}

// Rows of one LaneBlock: enough for two vectors while its matrices stay in the first-level cache, else one.
template <class T>
int64_t lane_rows(const Job<T>& job) {
  constexpr int64_t kCache = 40960;
  constexpr int64_t kPair = 2 * kLanes<T>;
  return job.p * job.q * kPair * static_cast<int64_t>(sizeof(T)) <= kCache ? kPair : kLanes<T>;
}

// Whether b as the innermost index fills vectors better than a row of a matrix does.
template <class T>
bool prefers_lanes(const Job<T>& job) {
  constexpr int64_t kLargest =
      262144 / kVectorBytes;  // elements of a matrix whose block still fits the second-level cache
  return 2 * (job.end - job.begin) >= kLanes<T> && job.p * job.q <= kLargest &&
         (smaller(job.p, job.q) < 2 * kLanes<T> || job.p * job.q < 1024);
}

template <class T>
T* working_memory(int64_t elements) {
  return static_cast<T*>(scratch(static_cast<size_t>(elements) * sizeof(T)));
}

template <class T, const Memory& kMemory, void (*lanes)(LaneBlock<T>, const Job<T>&, bool),
          void (*rows)(RowBlock<T>, const Job<T>&, bool)>
void run(const Job<T>& job) {
  if (prefers_lanes(job)) {
    const int64_t step = lane_rows(job);
    T* memory = working_memory<T>(kMemory.all * LaneBlock<T>::matrix_elements(job, step));
    for (int64_t b = job.begin; b < job.end; b += step)
      lanes(LaneBlock<T>(job, b, smaller(step, job.end - b), memory), job, b == job.begin);
  } else {
    const bool turn = job.q < kLanes<T> && job.p > job.q;
    const Job<T> turned = turn ? transposed_job(job) : job;
    const int matrices = turn ? kMemory.all : kMemory.intermediates;
    T* memory = working_memory<T>(RowBlock<T>::memory(turned, matrices));
    for (int64_t b = job.begin; b < job.end; ++b) rows(RowBlock<T>(turned, b, turn, memory), turned, b == job.begin);
  }
}

template <class T>
constexpr OrderKernels<T> kernels() {
  return {run<T, kForwardMemory, forward<T, LaneBlock<T>>, forward<T, RowBlock<T>>>,
          run<T, kBackwardMemory, backward<T, LaneBlock<T>>, backward<T, RowBlock<T>>>,
          run<T, kDoubleBackwardMemory, double_backward<T, LaneBlock<T>>, double_backward<T, RowBlock<T>>>};
}

}  // namespace

namespace kfo::cpu::KFO_ISA {

const TransformKernels transform_kernels = {kernels<float>(), kernels<double>()};

}  // namespace kfo::cpu::KFO_ISA
