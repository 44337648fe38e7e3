// Sums in global memory (sm_80 and newer).
#pragma once
#include "../platform.h"

namespace flash_ext {

FX_DEVICE void add_to(float* dst, float x) { atomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible; dst is aligned to both.
FX_DEVICE void add_to(float* dst, float a, float b) {
  if constexpr (ptx::kSm90) ptx::red_add_v2(dst, a, b);
  else atomicAdd(dst, a), atomicAdd(dst + 1, b);
}

// What was written before store_release is seen by who reads it after load_acquire.
FX_DEVICE int load_acquire(const int* src) { return ptx::ld_acquire(src); }
FX_DEVICE void store_release(int* dst, int x) { ptx::st_release(dst, x); }

// Whether add_async is there.
inline constexpr bool kHasAddAsync = ptx::kSm90;

// Makes what this thread wrote to shared memory visible to add_async, before the barrier that
// tells its caller.
FX_DEVICE void publish_to_add_async() { ptx::fence_proxy_async(); }

// dst[i] += src[i], i < count, by the copy engine while the calling thread goes on. Both aligned to
// 16 bytes, count a multiple of 4.
FX_DEVICE void add_async(float* dst, const float* src_smem, int count) {
  ptx::cp_reduce_async_bulk_add(dst, src_smem, count * static_cast<int>(sizeof(float)));
}

// Waits until the calling thread's add_async have read their sources ...
FX_DEVICE void wait_add_async_read() { ptx::cp_async_bulk_wait_group_read(); }

// ... or are done.
FX_DEVICE void wait_add_async() { ptx::cp_async_bulk_wait_group(); }

}  // namespace flash_ext
