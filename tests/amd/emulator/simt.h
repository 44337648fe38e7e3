// Runs the thread blocks of a kernel on the CPU, one after the other. Every lane is a fiber, which runs
// until it has to wait for others: at a barrier of its block, or where its wave exchanges values.
//
// Kernels are compiled with -fsanitize=thread, whose calls at every memory access end in simt.cpp
// instead of that sanitizer. So each access to shared memory is checked: two lanes must not touch the
// same bytes, one of them writing, without a barrier between; nothing is read that was not written.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

#if defined(__GFX9__)
inline constexpr int kWave = 64;
#else
inline constexpr int kWave = 32;
#endif
// Dynamic shared memory of a block.
#if defined(FX_EMULATE_SM90)
inline constexpr size_t kMostShared = 227 * 1024;
#elif defined(FX_EMULATE_SM86)
inline constexpr size_t kMostShared = 99 * 1024;
#else
inline constexpr size_t kMostShared = 64 * 1024;  // what every AMD GPU has
#endif

struct Fiber {
  dim3 thread;
  unsigned wave, lane;
  void* stack_pointer;
  const uint64_t* waits_for;  // until this is no longer `seen`; null: ready
  uint64_t seen;
  bool done;
};
extern Fiber* self;
extern dim3 block, block_size, grid_size;

// The order in which lanes and waves run: 0 as they are numbered, 1 the other way round, else shuffled.
extern uint64_t order;

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void barrier();

// An access to shared memory that the compiler does not announce.
void touch(const void* address, size_t bytes, bool write);

// Fails where it is looked at again and again: what would change it runs later.
int load_without_waiting(const int* src);

// Whether thread blocks run as they are numbered, whatever `order` says: those that take turns do.
extern bool blocks_in_order;

// Called when a lane returns, if set.
extern void (*at_return)();

// What the lanes of a wave have put down in an exchange. `name` and the number of bytes must be the
// same in all of them.
struct Deposits {
  static constexpr size_t kBytes = 128;
  alignas(64) unsigned char of[kWave][kBytes];
  uint64_t lanes;  // which have taken part, a bit each
  bool has(unsigned lane) const { return lanes >> lane & 1; }
};
// `complete` runs once, when the last lane has come. Lanes that have returned take no part;
// needs_all: an error then.
const Deposits& exchange(const char* name, const void* mine, size_t bytes, bool needs_all,
                         void (*complete)(Deposits&) = nullptr);

[[noreturn]] void fail(const char* format, ...);

}  // namespace simt
