// Sums in global memory (sm_80 and newer).
#pragma once
#include "../platform.h"

namespace flash_ext {

FX_DEVICE void add_one(float* dst, float x) { atomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible; dst is aligned to both.
FX_DEVICE void add_pair(float* dst, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(dst), "f"(a), "f"(b)
               : "memory");
#else
  atomicAdd(dst, a);
  atomicAdd(dst + 1, b);
#endif
}

}  // namespace flash_ext
