#include "simt.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// Saves the registers that a call must keep, and goes on where the other stack was left.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace flash_ext {
// The kernels' `extern __shared__`. The block's other shared variables lie round it: all that is
// thread_local in this module is shared memory.
alignas(128) thread_local unsigned char smem[simt::kMostShared];
asm(".globl _ZN9flash_ext6memoryE\n .set _ZN9flash_ext6memoryE, _ZN9flash_ext4smemE");  // also called memory
}  // namespace flash_ext

namespace simt {

Fiber* self;
dim3 block, block_size, grid_size;
uint64_t order;
void (*at_return)();
bool blocks_in_order;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMostLanes = 1024;

struct Wave {
  uint64_t round;  // exchanges that are complete
  int arrived, active;
  const char* name;
  size_t bytes;
  Deposits deposits[2];  // a lane may enter the next round while another still reads this one's
};

std::vector<Fiber> fibers;
std::vector<Wave> waves;
char* stacks;
void* scheduler_stack;
const std::function<void()>* entry;
int active, at_barrier;
uint64_t barriers;
std::string error;

// ---- shared memory: who touched it last

struct Touched {
  uint64_t written, read;  // value of `barriers` then, plus 1
  unsigned writer, reader;
  static constexpr unsigned kSeveral = ~0u;
};
unsigned char* shared;
size_t shared_bytes, dynamic_bytes;
uint64_t block_began;
std::vector<Touched> touched;  // for each two bytes

int find_shared(dl_phdr_info* info, size_t, void* inside) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    auto* const begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    if (part.p_type != PT_TLS || !begin || inside < begin || inside >= begin + part.p_memsz)
      continue;
    shared = begin, shared_bytes = part.p_memsz;
    return 1;
  }
  return 0;
}

// Several may write to the same place between two barriers if they write the same. The second one's
// value is not there yet when it is announced: it is looked at later.
struct SecondWrite {
  const void* address = nullptr;
  size_t bytes;
  unsigned char before[16];
} second_write;

void check_second_write() {
  if (!second_write.address) return;
  const bool same = !std::memcmp(second_write.address, second_write.before, second_write.bytes);
  second_write.address = nullptr;
  if (!same) fail("shared memory: two threads write different values, without a barrier between");
}

}  // namespace

void touch(const void* address, size_t bytes, bool write) {
  check_second_write();
  const size_t at = static_cast<const unsigned char*>(address) - shared;
  if (at >= shared_bytes) return;
  const ptrdiff_t in_dynamic = static_cast<const unsigned char*>(address) - flash_ext::smem;
  if (in_dynamic >= 0 && in_dynamic < static_cast<ptrdiff_t>(kMostShared) &&
      in_dynamic + bytes > dynamic_bytes)
    fail("shared memory: byte %td of %zu", in_dynamic, dynamic_bytes);
  const unsigned me = self->thread.x;
  for (size_t i = at / 2; i < (at + bytes + 1) / 2; ++i) {
    Touched& t = touched[i];
    if (write) {
      if (t.read == barriers + 1 && t.reader != me)
        fail("shared memory: thread %u writes where thread %d reads, without a barrier between", me,
             static_cast<int>(t.reader));
      if (t.written == barriers + 1 && t.writer != me && bytes <= sizeof second_write.before) {
        second_write = {address, bytes};
        std::memcpy(second_write.before, address, bytes);
      }
      t.written = barriers + 1, t.writer = me;
    } else {
      if (t.written < block_began + 1)
        fail("shared memory: thread %u reads what was not written", me);
      if (t.written == barriers + 1 && t.writer != me)
        fail("shared memory: thread %u reads what thread %u writes, without a barrier between", me,
             t.writer);
      t.reader = t.read == barriers + 1 && t.reader != me ? Touched::kSeveral : me;
      t.read = barriers + 1;
    }
  }
}

namespace {

// ---- fibers

void yield() {
  check_second_write();
  simt_switch(&self->stack_pointer, scheduler_stack);
}

void wait_for(const uint64_t& counter) {
  self->waits_for = &counter, self->seen = counter;
  yield();
  self->waits_for = nullptr;
}

void complete(Wave& w) { w.arrived = 0, ++w.round; }

void run_lane() {
  (*entry)();
  if (at_return) at_return();
  Wave& w = waves[self->wave];
  self->done = true;
  if (--w.active && w.arrived == w.active)
    fail("wave %u: some lanes return while the others wait in %s", self->wave, w.name);
  if (--active && at_barrier == active) at_barrier = 0, ++barriers;
  yield();
}

bool ready(const Fiber& f) { return !f.done && (!f.waits_for || *f.waits_for != f.seen); }

std::vector<int> order_of(int count, std::mt19937_64& random, bool keep = false) {
  std::vector<int> all(count);
  for (int i = 0; i < count; ++i) all[i] = order == 1 && !keep ? count - 1 - i : i;
  if (order > 1 && !keep) std::shuffle(all.begin(), all.end(), random);
  return all;
}

void start_block(dim3 which) {
  const int lanes = block_size.x;
  block = which;
  active = lanes, at_barrier = 0;
  block_began = ++barriers;
  std::memset(shared, 0xff, shared_bytes);  // NaN
  for (Wave& w : waves) w.round = 0, w.arrived = 0, w.active = kWave;
  for (int i = 0; i < lanes; ++i) {
    // Stacks that begin at different places of a page do not fight for the same lines of the cache.
    void** top = reinterpret_cast<void**>(stacks + kStack * (i + 1) - 64 * (i % 61 + 1));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(run_lane);
    top -= 6;
    fibers[i] = {{static_cast<unsigned>(i), 0, 0},
                 unsigned(i / kWave),
                 unsigned(i % kWave),
                 top,
                 nullptr,
                 0,
                 false};
  }
}

// Lets one wave run until all of its lanes wait for another wave.
bool run_wave(int wave, std::mt19937_64& random) {
  bool any = false;
  for (bool ran = true; ran; any |= ran) {
    ran = false;
    for (const int lane : order_of(kWave, random)) {
      self = &fibers[wave * kWave + lane];
      if (!ready(*self)) continue;
      ran = true;
      simt_switch(&scheduler_stack, self->stack_pointer);
      if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
    }
  }
  return any;
}

}  // namespace

void fail(const char* format, ...) {
  char text[300];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (error.empty()) error = text;
  for (;;)
    simt_switch(&self->stack_pointer,
                scheduler_stack);  // the scheduler throws; this fiber never runs again
}

void launch(dim3 grid, dim3 threads, size_t bytes, const std::function<void()>& kernel) {
  if (threads.x % kWave || threads.x > kMostLanes || threads.y * threads.z != 1)
    throw std::runtime_error("simt: expected a block of whole waves, up to 1024 threads");
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kStack * kMostLanes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  flash_ext::smem[0] = 0;
  dl_iterate_phdr(find_shared, flash_ext::smem);
  touched.resize(shared_bytes / 2 + 1);
  if (bytes > kMostShared) throw std::runtime_error("simt: more shared memory than the GPU has");
  grid_size = grid, block_size = threads, dynamic_bytes = bytes, entry = &kernel;
  fibers.resize(threads.x);
  waves.resize(threads.x / kWave);
  std::mt19937_64 random(order);
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (const int i : order_of(static_cast<int>(blocks), random, blocks_in_order)) {
    start_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
    while (active) {
      bool any = false;
      for (const int wave : order_of(static_cast<int>(waves.size()), random))
        any |= run_wave(wave, random);
      if (!any)
        throw std::runtime_error("simt: some threads wait at a barrier that others never reach");
    }
  }
}

int load_without_waiting(const int* src) {
  constexpr int kMostLooks = 1000;
  static const int* watched;
  static int looks;
  looks = src == watched ? looks + 1 : 0;
  watched = src;
  if (looks > kMostLooks) fail("a thread block waits for one that has not run");
  return *src;
}

void barrier() {
  if (++at_barrier == active) at_barrier = 0, ++barriers;
  else wait_for(barriers);
}

const Deposits& exchange(const char* name, const void* mine, size_t bytes, bool needs_all,
                         void (*completed)(Deposits&)) {
  Wave& w = waves[self->wave];
  Deposits& deposits = w.deposits[w.round % 2];
  if (needs_all && w.active != kWave) fail("%s: some lanes have returned already", name);
  if (w.arrived == 0) w.name = name, w.bytes = bytes, deposits.lanes = 0;
  if (std::strcmp(w.name, name) || w.bytes != bytes)
    fail("wave %u: some lanes are in %s, others in %s", self->wave, w.name, name);
  std::memcpy(deposits.of[self->lane], mine, bytes);
  deposits.lanes |= uint64_t{1} << self->lane;
  if (++w.arrived < w.active) {
    wait_for(w.round);
  } else {
    if (completed) completed(deposits);
    complete(w);
  }
  return deposits;
}

}  // namespace simt

// What -fsanitize=thread calls.
extern "C" {
void __tsan_init() {}
#define FX_TOUCH(bytes)                                                        \
  void __tsan_read##bytes(void* p) { simt::touch(p, bytes, false); }           \
  void __tsan_write##bytes(void* p) { simt::touch(p, bytes, true); }           \
  void __tsan_unaligned_read##bytes(void* p) { simt::touch(p, bytes, false); } \
  void __tsan_unaligned_write##bytes(void* p) { simt::touch(p, bytes, true); } \
  void __tsan_read_write##bytes(void* p) {                                     \
    simt::touch(p, bytes, false), simt::touch(p, bytes, true);                 \
  }                                                                            \
  void __tsan_unaligned_read_write##bytes(void* p) { __tsan_read_write##bytes(p); }
FX_TOUCH(1)
FX_TOUCH(2) FX_TOUCH(4) FX_TOUCH(8) FX_TOUCH(16) void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  simt::touch(from, bytes, false), simt::touch(to, bytes, true);
  return std::memmove(to, from, bytes);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  return __tsan_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) {
  simt::touch(to, bytes, true);
  return std::memset(to, value, bytes);
}

// float to bfloat16, which clang leaves to a library that is not everywhere.
__bf16 __truncsfbf2(float x) {
  uint32_t bits = __builtin_bit_cast(uint32_t, x);
  bits = x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, static_cast<uint16_t>(bits >> 16));
}
}
