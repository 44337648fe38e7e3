// Sums in global memory.
#pragma once
#include "../platform.h"

namespace flash_ext {

// "Unsafe" for memory that is not the GPU's own, which results are.
FX_DEVICE void add_one(float* dst, float x) { unsafeAtomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible.
FX_DEVICE void add_pair(float* dst, float a, float b) { add_one(dst, a), add_one(dst + 1, b); }

}  // namespace flash_ext
