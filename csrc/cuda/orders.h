// What the three orders of the transform share on the host: schedules, outputs as the kernels see them, and launches.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "../check_transform.h"
#include "../lru_cache.h"
#include "../tensors.h"
#include "launch.h"
#include "schedule.h"

namespace kfo::cuda {

// An output of `new_output` as the kernels see it.
template <typename T>
PackedRows<T> output(const Tensor& tensor) {
  if (tensor.dim() == 1) return {};
  return {written<T>(tensor), tensor.size(1)};
}

// The schedule of a call, made once for a group and a request. One of many launches costs more to keep than to make.
inline std::shared_ptr<const Schedule> schedule_of(const std::vector<int64_t>& shapes, const Group& group,
                                                   const Request& request) {
  constexpr size_t kept_launches = 16;
  static LruCache<std::pair<std::vector<int64_t>, decltype(request.key())>, Schedule> memo;
  return memo.get(
      {shapes, request.key()}, [&] { return make_schedule(group, request); },
      [](const Schedule& schedule) { return schedule.launches.size() + schedule.tiled.size() <= kept_launches; });
}

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

}  // namespace kfo::cuda
