// What AddressSanitizer and ThreadSanitizer must be told about fibers; nothing where neither is on.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// Of a function in which the scheduler and fibers share what no kernel sees.
#if defined(__SANITIZE_THREAD__)
#define KFO_UNSEEN __attribute__((no_sanitize_thread))
#else
#define KFO_UNSEEN
#endif

namespace kfo::emulation::sanitizer {

inline char launch_begins, launch_ends;  // points of synchronisation, known by their addresses

#if defined(__SANITIZE_THREAD__)

constexpr bool kFreshMemory = true;  // two blocks at one address would look like a race

struct Context {
  void* fiber = nullptr;
};

inline void release(char& point) { __tsan_release(&point); }
inline void acquire(char& point) { __tsan_acquire(&point); }
KFO_UNSEEN inline void start(Context& scheduler) { scheduler.fiber = __tsan_get_current_fiber(); }
inline void create(Context& fiber, void*, size_t) { fiber.fiber = __tsan_create_fiber(0); }
inline void destroy(Context& fiber) { __tsan_destroy_fiber(fiber.fiber); }
KFO_UNSEEN inline void leave(Context&, Context& to, bool) {
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
}
inline void arrive(Context&, Context*) {}

#else

constexpr bool kFreshMemory = false;

struct Context {
  const void* stack = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;
};

inline void release(char&) {}
inline void acquire(char&) {}
inline void start(Context&) {}
inline void destroy(Context&) {}
inline void create(Context& fiber, [[maybe_unused]] void* stack, [[maybe_unused]] size_t bytes) {
  fiber = {stack, bytes, nullptr};
}

// The last leave of a fiber hands over no fake stack: null tells the sanitizer to free it.
inline void leave([[maybe_unused]] Context& from, [[maybe_unused]] Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, to.stack, to.bytes);
#endif
}

// `came_from`: whose stack is not known beforehand, the scheduler's.
inline void arrive([[maybe_unused]] Context& self, [[maybe_unused]] Context* came_from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake, came_from ? &came_from->stack : nullptr,
                                  came_from ? &came_from->bytes : nullptr);
  self.fake = nullptr;
#endif
}

#endif

}  // namespace kfo::emulation::sanitizer
