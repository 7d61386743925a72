// What the three ops share on the host: operands and outputs as the kernels see them, and launches on torch's stream.
#pragma once

#ifndef USE_CUDA
#define USE_CUDA  // torch's stable headers declare their CUDA functions under it
#endif

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../check_batch_norm.h"
#include "../memo.h"
#include "../outputs.h"
#include "schedule.h"

namespace kfo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An operand with contiguous rows, which it keeps alive; absent if there is no tensor.
class Input {
 public:
  explicit Input(const std::optional<Tensor>& tensor) {
    if (tensor) tensor_ = contiguous_rows(*tensor);
  }

  template <typename T>
  Operand<T> operand() const {
    if (!tensor_) return {};
    const Packed<T> rows = packed<T>(*tensor_);
    return {rows.data, rows.stride};
  }

 private:
  std::optional<Tensor> tensor_;
};

template <typename T>
Output<T> output(const Tensor& tensor) {
  if (tensor.dim() == 1) return {};
  return {static_cast<T*>(tensor.mutable_data_ptr()), tensor.size(1)};
}

// The schedule of a call, made once for a group and a request. One of many launches costs more to keep than to make.
inline std::shared_ptr<const Schedule> schedule_of(const std::vector<int64_t>& shapes, const Group& group,
                                                   const Request& request) {
  constexpr size_t kept_launches = 16;
  static Memo<std::pair<std::vector<int64_t>, decltype(request.key())>, Schedule> memo;
  return memo.get(
      {shapes, request.key()}, [&] { return make_schedule(group, request); },
      [](const Schedule& schedule) { return schedule.launches.size() + schedule.tiled.size() <= kept_launches; });
}

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

// Kernels that all orders share; defined for float and double, each in a file of its own.
template <typename T>
void launch_sums(const Launcher& launcher, const Launch& part, const Data<T>& data);
template <typename T>
void launch_tiles(const Launcher& launcher, const TiledLaunch& part, const Data<T>& data);

// The order's kernel and the sums of dR and dL, then the tiles of the large problems. `like` gives dtype and device.
template <auto kKernel, typename T>
void run(const char* op, const Schedule& schedule, const Tensor& like, Data<T> data) {
  const Launcher launcher(op, like.get_device_index());
  // Freed on return but safe: torch's allocator reuses it on this stream only.
  std::optional<Tensor> scratch;
  if (schedule.scratch) scratch = new_tensor(like, {schedule.scratch});
  T* memory = scratch ? static_cast<T*>(scratch->mutable_data_ptr()) : nullptr;
  data[kIntermediates] = {memory, schedule.scratch_columns};
  data[kScratch] = {memory, schedule.scratch_columns};
  for (const Launch& part : schedule.launches) {
    launcher.launch<kKernel>(part.blocks, part.shared_bytes, Arguments<T, Table>{part.table, data});
    launch_sums(launcher, part, data);
  }
  for (const TiledLaunch& part : schedule.tiled) launch_tiles(launcher, part, data);
}

// f(T()) with the C++ type of a checked dtype.
template <typename F>
void with_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float)
    f(float());
  else
    f(double());
}

}  // namespace kfo::cuda
