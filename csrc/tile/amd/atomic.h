// Sums in global memory.
#pragma once
#include "../platform.h"

namespace flash_ext {

// dst[0] += a, dst[1] += b, each indivisible.
FX_DEVICE void add_pair(float* dst, float a, float b) {
  unsafeAtomicAdd(dst, a);  // "unsafe" for memory that is not the GPU's own
  unsafeAtomicAdd(dst + 1, b);
}

}  // namespace flash_ext
