// Warpgroups: 128 threads, which have wgmma, registers and turns in common.
#pragma once
#include "../tile/platform.h"

namespace flash_ext::sm90 {

inline constexpr int kWarpgroup = 128;

// The same in all lanes, and known by the compiler to be.
template <typename X>
FX_DEVICE X uniform(X x) {
  return __shfl_sync(0xffffffffu, x, 0);
}
FX_DEVICE int warpgroup_id() { return uniform(static_cast<int>(threadIdx.x) / kWarpgroup); }

// Registers of each thread from here on. All warps of a warpgroup must ask.
template <int kCount>
FX_DEVICE void give_registers_away() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FX_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Named barriers; number 0 is __syncthreads. `threads` of them arrive or wait, then all go on.
FX_DEVICE void barrier_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
FX_DEVICE void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace flash_ext::sm90
