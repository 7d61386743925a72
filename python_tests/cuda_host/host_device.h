// Runs CUDA kernels on the host: include before the .cuh files. One fiber per CUDA thread, blocks one after the other.
// A barrier is a switch back to the scheduler; a thread that skips a barrier that others wait at is an error.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __grid_constant__
#define __shared__ __thread
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

namespace kfo::emulation {

struct Dim {
  unsigned x = 0;
};

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done;
};

inline thread_local ucontext_t scheduler;
inline thread_local Fiber* running;
inline thread_local std::function<void()> body;
inline thread_local unsigned thread_index, block_index, block_dim;

#if defined(__SANITIZE_ADDRESS__)
inline thread_local void* scheduler_fake;
inline thread_local const void* scheduler_stack;
inline thread_local size_t scheduler_stack_bytes;
#endif

// The exit of a fiber hands over no fake stack: null tells the sanitizer to free it.
inline void yield(bool last) {
  Fiber* self = running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
#else
  (void)last;
#endif
  swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  body();
  running->done = true;
  yield(true);
}

inline void resume(Fiber& fiber) {
  running = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.get(), kStackBytes);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

}  // namespace kfo::emulation

#define threadIdx (kfo::emulation::Dim{kfo::emulation::thread_index})
#define blockIdx (kfo::emulation::Dim{kfo::emulation::block_index})
#define blockDim (kfo::emulation::Dim{kfo::emulation::block_dim})

inline void __syncthreads() { kfo::emulation::yield(false); }

namespace kfo::cuda {
// The dynamic shared memory that kernels declare as extern.
alignas(16) inline __thread unsigned char shared_memory[48 * 1024];
}  // namespace kfo::cuda

namespace kfo::emulation {

template <typename Args>
void launch(void (*kernel)(Args), int64_t blocks, int64_t threads, int64_t shared_bytes, const Args& args) {
  static thread_local std::vector<Fiber> fibers;
  fibers.resize(threads);
  block_dim = static_cast<unsigned>(threads);
  body = [&] { kernel(args); };
  for (int64_t block = 0; block < blocks; ++block) {
    block_index = static_cast<unsigned>(block);
    std::memset(cuda::shared_memory, 0xff, sizeof cuda::shared_memory);  // NaN: nothing may be read unwritten
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(cuda::shared_memory + shared_bytes, sizeof cuda::shared_memory - shared_bytes);
#else
    (void)shared_bytes;
#endif
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    for (size_t finished = 0; finished < fibers.size();) {
      for (size_t i = 0; i < fibers.size(); ++i) {
        thread_index = static_cast<unsigned>(i);
        resume(fibers[i]);
        finished += fibers[i].done;
      }
      if (finished != 0 && finished != fibers.size())
        throw std::logic_error("a thread left before a barrier of its block");
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(cuda::shared_memory, sizeof cuda::shared_memory);
#endif
  }
}

}  // namespace kfo::emulation
