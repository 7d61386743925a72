// What all ops share on the host: launches on torch's stream, and their errors.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "table.h"

namespace kfo::cuda {

// Launches for one call of an op, on torch's current stream of a device whose guard the caller holds.
class Launcher {
 public:
  Launcher(const char* op, int device) : op_(op), device_(device) {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "before the launch");
    if (major < 8)
      fail("expected a GPU of compute capability 8.0 or later, cuda:" + std::to_string(device) + " is of " +
           std::to_string(major) + ".x");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <auto kKernel, typename Args>
  void launch(int64_t blocks, int64_t shared_bytes, const Args& args) const {
    static_assert(sizeof(Args) <= kParameterBytes, "the table must fit in the kernel's parameters");
    if (blocks == 0) return;
    if (shared_bytes > 48 * 1024) allow_shared_memory<kKernel>();
    kKernel<<<static_cast<unsigned>(blocks), kThreads, static_cast<size_t>(shared_bytes), stream_>>>(args);
    check(cudaGetLastError(), "at the launch");
  }

 private:
  const char* op_;
  int device_;
  cudaStream_t stream_;

  // More than 48 KB must be asked for, once for each kernel and device.
  template <auto kKernel>
  void allow_shared_memory() const {
    static std::atomic<uint64_t> allowed{0};
    const uint64_t bit = device_ < 64 ? uint64_t{1} << device_ : 0;
    if (allowed.load() & bit) return;
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          "asking for shared memory");
    allowed.fetch_or(bit);
  }

  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string("kfo_ext::") + op_ + ": " + message);
  }

  // The error may be that of earlier work: CUDA reports what failed asynchronously at the next call.
  void check(cudaError_t error, const char* when) const {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // else the next good launch would report it again
    fail(std::string("CUDA error ") + when + ", of this or of earlier work: " + cudaGetErrorString(error));
  }
};

}  // namespace kfo::cuda
