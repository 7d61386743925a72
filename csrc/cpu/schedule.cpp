#include "schedule.h"

#include <tuple>

#include "../lru_cache.h"

namespace kfo::cpu {

std::shared_ptr<const Schedule> schedule_of(const std::vector<int64_t>& shapes, int64_t tasks, Order order,
                                            bool shared_R, bool shared_L) {
  constexpr size_t kept_chunks = 65536;  // a larger schedule costs more to keep than to make
  static LruCache<std::tuple<std::vector<int64_t>, int64_t, Order, bool, bool>, Schedule> memo;
  return memo.get(
      {shapes, tasks, order, shared_R, shared_L},
      [&] { return make_schedule(shapes, tasks, order, shared_R, shared_L); },
      [](const Schedule& schedule) { return schedule.chunks.size() <= kept_chunks; });
}

}  // namespace kfo::cpu
