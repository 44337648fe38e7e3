// Sums in global memory.
#pragma once
#include "../platform.h"

namespace flash_ext {

// "Unsafe" for memory that is not the GPU's own, which results are.
FX_DEVICE void add_to(float* dst, float x) { unsafeAtomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible.
FX_DEVICE void add_to(float* dst, float a, float b) { add_to(dst, a), add_to(dst + 1, b); }

// There is no engine that adds.
inline constexpr bool kHasAddAsync = false;
FX_DEVICE void publish_to_add_async() {}
FX_DEVICE void add_async(float*, const float*, int) {}
FX_DEVICE void wait_add_async_read() {}
FX_DEVICE void wait_add_async() {}

}  // namespace flash_ext
