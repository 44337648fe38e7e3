// Working memory of one thread: taken in pieces during a task, given back all at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace flash_ext::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { release(); }

  // n uninitialised elements on a cache line, valid until reset().
  template <typename T>
  T* take(int64_t n) {
    const size_t bytes =
        (size_t(n) * sizeof(T) + 255) / 128 * 128;  // a line to spare between neighbours
    if (chunks_.empty() || chunks_.back().size - used_ < bytes) grow(bytes);
    T* at = reinterpret_cast<T*>(chunks_.back().data + used_);
    used_ += bytes;
    return at;
  }

  // Makes one chunk of several, so that the next task of the kind finds all it needs in one.
  void reset() {
    if (chunks_.size() > 1) {
      size_t total = 0;
      for (const Chunk& c : chunks_) total += c.size;
      release();
      grow(total);
    }
    used_ = 0;
  }

  // What a thread keeps between calls is bounded.
  void shrink(size_t keep_bytes) {
    if (!chunks_.empty() && chunks_.back().size > keep_bytes) release();
  }

 private:
  struct Chunk {
    char* data;
    size_t size;
  };
  void grow(size_t bytes) {
    bytes = (bytes + 4095) / 4096 * 4096;
    char* data = static_cast<char*>(std::aligned_alloc(4096, bytes));
    if (!data) throw std::bad_alloc();
    chunks_.push_back({data, bytes});
    used_ = 0;
  }
  void release() {
    for (const Chunk& c : chunks_) std::free(c.data);
    chunks_.clear();
    used_ = 0;
  }

  std::vector<Chunk> chunks_;
  size_t used_ = 0;
};

}  // namespace flash_ext::cpu
