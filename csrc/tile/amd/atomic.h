// Sums in global memory.
#pragma once
#include "../platform.h"

namespace flash_ext {

// "Unsafe" for memory that is not the GPU's own, which results are.
FX_DEVICE void add_to(float* dst, float x) { unsafeAtomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible.
FX_DEVICE void add_to(float* dst, float a, float b) { add_to(dst, a), add_to(dst + 1, b); }

// What was written before store_release is seen by who reads it after load_acquire.
FX_DEVICE int load_acquire(const int* src) {
  return __hip_atomic_load(src, __ATOMIC_ACQUIRE, __HIP_MEMORY_SCOPE_AGENT);
}
FX_DEVICE void store_release(int* dst, int x) {
  __hip_atomic_store(dst, x, __ATOMIC_RELEASE, __HIP_MEMORY_SCOPE_AGENT);
}

// There is no engine that adds.
inline constexpr bool kHasAddAsync = false;
FX_DEVICE void publish_to_add_async() {}
FX_DEVICE void add_async(float*, const float*, int) {}
FX_DEVICE void wait_add_async_read() {}
FX_DEVICE void wait_add_async() {}

}  // namespace flash_ext
