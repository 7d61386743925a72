#include "schedule.h"

#include <list>
#include <mutex>

namespace kfo::cpu {

namespace {

struct Key {
  std::vector<int64_t> shapes;
  int64_t tasks;
  Order order;
  bool shared_R, shared_L;

  bool operator==(const Key& other) const {
    return tasks == other.tasks && order == other.order && shared_R == other.shared_R && shared_L == other.shared_L &&
           shapes == other.shapes;
  }
};

struct Entry {
  Key key;
  std::shared_ptr<const Schedule> schedule;
};

// A program uses a handful of groups; a list in order of use finds them faster than a map would hash them.
constexpr size_t kRemembered = 64;
constexpr size_t kRememberedChunks = 65536;  // of one schedule: a larger one costs more to keep than to make

}  // namespace

std::shared_ptr<const Schedule> schedule_of(const std::vector<int64_t>& shapes, int64_t tasks, Order order,
                                            bool shared_R, bool shared_L) {
  static std::mutex mutex;
  static std::list<Entry> entries;
  Key key{shapes, tasks, order, shared_R, shared_L};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto entry = entries.begin(); entry != entries.end(); ++entry)
      if (entry->key == key) {
        entries.splice(entries.begin(), entries, entry);
        return entry->schedule;
      }
  }
  auto schedule = std::make_shared<const Schedule>(make_schedule(shapes, tasks, order, shared_R, shared_L));
  if (schedule->chunks.size() > kRememberedChunks) return schedule;
  const std::lock_guard<std::mutex> lock(mutex);
  entries.push_front({std::move(key), schedule});
  if (entries.size() > kRemembered) entries.pop_back();
  return schedule;
}

}  // namespace kfo::cpu
