// A thread-safe cache of the values of the keys used last.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace kfo {

// A program uses a handful of groups; a list in order of use finds them faster than a map would hash them.
template <class Key, class Value>
class LruCache {
 public:
  // The value of `key`: the remembered one, or what `make()` returns, remembered where `worth_keeping(value)`.
  template <class Make, class WorthKeeping>
  std::shared_ptr<const Value> get(Key key, Make make, WorthKeeping worth_keeping) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
        if (entry->first == key) {
          entries_.splice(entries_.begin(), entries_, entry);
          return entry->second;
        }
    }
    auto value = std::make_shared<const Value>(make());
    if (!worth_keeping(*value)) return value;
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace_front(std::move(key), value);
    if (entries_.size() > kRemembered) entries_.pop_back();
    return value;
  }

 private:
  static constexpr size_t kRemembered = 64;

  std::mutex mutex_;
  std::list<std::pair<Key, std::shared_ptr<const Value>>> entries_;
};

}  // namespace kfo
