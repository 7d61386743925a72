// A buffer that grows on demand and is kept between calls: page faults of fresh memory cost more than the arithmetic.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

namespace kfo::cpu {

constexpr size_t kKeptBytes = size_t{16} << 20;  // that a thread may keep between calls

class ScratchBuffer {
 public:
  ScratchBuffer() = default;
  ScratchBuffer(const ScratchBuffer&) = delete;
  ScratchBuffer& operator=(const ScratchBuffer&) = delete;
  ~ScratchBuffer() { std::free(memory_); }

  // At least `bytes`, 64-byte aligned; what it held before is lost.
  void* reserve(size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    release();  // so that the end of what was asked for is watched
#endif
    if (bytes > size_) {
      release();
      if (posix_memalign(&memory_, 64, bytes)) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }

  // Frees the memory if it exceeds `keep` bytes.
  void trim(size_t keep) {
    if (size_ > keep) release();
  }

 private:
  void release() {
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

  void* memory_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kfo::cpu
