// Barriers in shared memory, for which copies as well as threads can arrive.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-mbarrier
#pragma once
#include "../tile/platform.h"

namespace flash_ext::sm90 {

// Completes a phase each time that `arrivals` threads have arrived and the bytes they announced are
// there. Phases are counted modulo two.
struct Mbarrier {
  uint64_t state;

  FX_DEVICE void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ptx::shared_address(&state)),
                 "r"(arrivals)
                 : "memory");
  }
  // Makes init known to the copy engine, before the barrier that tells the other threads.
  FX_DEVICE static void publish_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  FX_DEVICE void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(ptx::shared_address(&state))
                 : "memory");
  }
  // Arrives, and lets the phase last until so many bytes have been copied.
  FX_DEVICE void arrive_and_expect(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(ptx::shared_address(&state)),
        "r"(bytes)
        : "memory");
  }
  // Waits until the phase of this parity is complete; that before the first one counts as odd.
  FX_DEVICE void wait(unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(ptx::shared_address(&state)),
        "r"(parity)
        : "memory");
  }
};

// Where a thread is in a ring of kStages places, each of which is filled and emptied in turn.
template <int kStages>
struct RingPosition {
  int stage = 0;
  unsigned parity = 0;

  FX_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One place: filled by the copy engine or a warp's lanes, emptied by warps.
struct Place {
  Mbarrier full, empty;

  FX_DEVICE void init(int readers, int writers = 1) { full.init(writers), empty.init(readers); }
  FX_DEVICE void wait_full(unsigned parity) { full.wait(parity); }
  FX_DEVICE void wait_empty(unsigned parity) { empty.wait(parity ^ 1); }
  // Of one warp: its products read no more.
  FX_DEVICE void release() {
    if (lane_id() == 0) empty.arrive();
  }
};

}  // namespace flash_ext::sm90
