// Runs CUDA kernels on the host: include before the .cuh files. One fiber per CUDA thread, blocks one after the other.
// A thread that waits at a barrier, of its block or its warp, switches back to the scheduler; one that skips a barrier
// that others wait at is an error. A shuffle waits for the warp too, but orders no memory, as on a GPU.
// Under ThreadSanitizer fibers count as threads that nothing but barriers orders, and blocks as ordered by launches
// alone: a missing barrier, or two blocks at one address, is reported as the race that it would be.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "sanitizers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ __thread
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

namespace kfo::emulation {

struct Dim {
  unsigned x = 0;
};

constexpr size_t kStackBytes = 64 * 1024;

inline std::unique_ptr<char[]> allocate(size_t bytes) { return std::unique_ptr<char[]>(new char[bytes]); }

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // of the bytes, the last ones
};

// Where so many threads wait for each other. Nobody is at the next but one before all have left this one, so that two
// points of synchronisation, known by their addresses, are enough.
struct Barrier {
  unsigned threads = 0, arrived = 0, passed = 0;
  char points[2];
};

constexpr unsigned kWarp = 32;

struct Warp {
  Barrier barrier;
  double values[2][kWarp];  // of shuffles
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = allocate(kStackBytes);
  std::atomic<bool> done{false};
  std::vector<Copy> copies;               // asynchronous ones, not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, not waited for yet
  Barrier* block = nullptr;
  Warp* warp = nullptr;
  sanitizer::Context sanitized;
};

struct Block {
  std::vector<Fiber> fibers;
  std::unique_ptr<char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  Block(size_t threads, size_t shared_bytes)
      : fibers(threads), shared(allocate(shared_bytes)), warps((threads + kWarp - 1) / kWarp) {}
  // Not before the end of the launch: the sanitizer would take a later fiber for the same thread.
  ~Block() {
    for (Fiber& fiber : fibers) sanitizer::destroy(fiber.sanitized);
  }
};

// Written by the scheduler and read by fibers: atomic, so that no sanitizer takes them for a race.
inline ucontext_t scheduler;
inline sanitizer::Context scheduler_sanitized;
inline std::atomic<Fiber*> running;
inline std::atomic<unsigned> thread_index, block_index, block_dim;
inline std::atomic<size_t> arrivals;  // at barriers, and at the end of the kernel
inline std::function<void()> body;

inline unsigned load(const std::atomic<unsigned>& value) { return value.load(std::memory_order_relaxed); }

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::abort();
}

inline void yield(bool last) {
  Fiber* self = running.load(std::memory_order_relaxed);
  sanitizer::leave(self->sanitized, scheduler_sanitized, last);
  swapcontext(&self->context, &scheduler);
  sanitizer::arrive(self->sanitized, &scheduler_sanitized);
}

// Returns how many barriers the threads had passed before. `orders`: whether it orders their accesses to memory too.
KFO_UNSEEN inline unsigned wait(Barrier& barrier, bool orders) {
  const unsigned passed = barrier.passed;
  if (orders) sanitizer::release(barrier.points[passed % 2]);
  arrivals.fetch_add(1, std::memory_order_relaxed);
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
  while (barrier.passed == passed) yield(false);
  if (orders) sanitizer::acquire(barrier.points[passed % 2]);
  return passed;
}

// The value of another lane of the warp.
template <typename T>
KFO_UNSEEN T shuffle(unsigned mask, T value, unsigned from) {
  if (mask != ~0u) fail("a shuffle of less than a warp");
  Warp& warp = *running.load(std::memory_order_relaxed)->warp;
  const unsigned lane = load(thread_index) % kWarp, turn = warp.barrier.passed % 2;
  warp.values[turn][lane] = static_cast<double>(value);
  wait(warp.barrier, false);
  return static_cast<T>(warp.values[turn][from]);
}

inline void enter() {
  Fiber* self = running.load(std::memory_order_relaxed);
  sanitizer::arrive(self->sanitized, &scheduler_sanitized);
  sanitizer::acquire(sanitizer::launch_begins);
  body();
  if (!self->copies.empty() || !self->groups.empty()) fail("a thread left asynchronous copies behind");
  self->done.store(true, std::memory_order_relaxed);
  arrivals.fetch_add(1, std::memory_order_relaxed);
  sanitizer::release(sanitizer::launch_ends);
  yield(true);
}

inline void resume(Fiber& fiber) {
  running.store(&fiber, std::memory_order_relaxed);
  sanitizer::leave(scheduler_sanitized, fiber.sanitized, false);
  swapcontext(&scheduler, &fiber.context);
  sanitizer::arrive(scheduler_sanitized, nullptr);
}

// An asynchronous copy needs both addresses aligned to its size.
inline void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("a misaligned asynchronous copy");
  running.load(std::memory_order_relaxed)->copies.push_back({to, from, bytes, zeros});
}

inline void commit_copies() {
  Fiber* self = running.load(std::memory_order_relaxed);
  self->groups.push_back(std::move(self->copies));
  self->copies.clear();
}

// All committed groups but the last `remaining`: a copy that no commit closed in is not waited for.
inline void complete_copies(size_t remaining) {
  std::vector<std::vector<Copy>>& groups = running.load(std::memory_order_relaxed)->groups;
  while (groups.size() > remaining) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace kfo::emulation

inline int min(int a, int b) { return a < b ? a : b; }
inline int __clz(int n) { return n ? __builtin_clz(static_cast<unsigned>(n)) : 32; }

// A store of 16 bytes, which needs an address of that alignment.
template <typename T>
inline void __stwb(T* to, T value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(T)) kfo::emulation::fail("a misaligned store");
  std::memcpy(to, &value, sizeof(T));
}

#define threadIdx (kfo::emulation::Dim{kfo::emulation::load(kfo::emulation::thread_index)})
#define blockIdx (kfo::emulation::Dim{kfo::emulation::load(kfo::emulation::block_index)})
#define blockDim (kfo::emulation::Dim{kfo::emulation::load(kfo::emulation::block_dim)})

inline void __syncthreads() {
  kfo::emulation::wait(*kfo::emulation::running.load(std::memory_order_relaxed)->block, true);
}

inline void __syncwarp() {
  kfo::emulation::wait(kfo::emulation::running.load(std::memory_order_relaxed)->warp->barrier, true);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  using namespace kfo::emulation;
  return shuffle(mask, value, (load(thread_index) % kWarp) ^ static_cast<unsigned>(lanes));
}

// The dynamic shared memory: kernels declare an extern array, here it is one that a pointer names.
#define shared_memory (*shared_pointer)
namespace kfo::cuda {
inline __thread unsigned char shared_memory[];
}

namespace kfo::emulation {

KFO_UNSEEN inline void use_shared_memory(char* memory) {
  cuda::shared_pointer = reinterpret_cast<unsigned char (*)[]>(memory);
}

inline void start(Fiber& fiber) {
  fiber.done.store(false, std::memory_order_relaxed);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  sanitizer::create(fiber.sanitized, fiber.stack.get(), kStackBytes);
}

KFO_UNSEEN inline void set_barriers(Block& block) {
  block.barrier = {};
  for (Warp& warp : block.warps) warp.barrier = {};
  for (size_t i = 0; i < block.fibers.size(); ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block.barrier;
    fiber.warp = &block.warps[i / kWarp];
    ++fiber.block->threads;
    ++fiber.warp->barrier.threads;
  }
}

inline void run(Block& block) {
  set_barriers(block);
  for (Fiber& fiber : block.fibers) start(fiber);
  sanitizer::release(sanitizer::launch_begins);
  for (size_t finished = 0; finished < block.fibers.size();) {
    const size_t before = arrivals.load(std::memory_order_relaxed);
    for (size_t i = 0; i < block.fibers.size(); ++i) {
      if (block.fibers[i].done.load(std::memory_order_relaxed)) continue;
      thread_index.store(static_cast<unsigned>(i), std::memory_order_relaxed);
      resume(block.fibers[i]);
      finished += block.fibers[i].done.load(std::memory_order_relaxed);
    }
    if (arrivals.load(std::memory_order_relaxed) == before) fail("a thread left before a barrier of its block");
  }
}

template <typename Args>
void launch(void (*kernel)(Args), int64_t blocks, int64_t threads, int64_t shared_bytes, const Args& args) {
  std::vector<std::unique_ptr<Block>> used;
  body = [&] { kernel(args); };
  block_dim.store(static_cast<unsigned>(threads));
  sanitizer::start(scheduler_sanitized);
  for (int64_t index = 0; index < blocks; ++index) {
    if (used.empty() || sanitizer::kFreshMemory) used.push_back(std::make_unique<Block>(threads, shared_bytes));
    Block& block = *used.back();
    std::memset(block.shared.get(), 0xff, shared_bytes);  // NaN: nothing may be read unwritten
    use_shared_memory(block.shared.get());
    block_index.store(static_cast<unsigned>(index), std::memory_order_relaxed);
    run(block);
  }
  sanitizer::acquire(sanitizer::launch_ends);
}

}  // namespace kfo::emulation
