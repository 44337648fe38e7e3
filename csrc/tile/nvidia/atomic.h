// Sums in global memory (sm_80 and newer).
#pragma once
#include "../platform.h"

namespace flash_ext {

FX_DEVICE void add_to(float* dst, float x) { atomicAdd(dst, x); }

// dst[0] += a, dst[1] += b, each indivisible; dst is aligned to both.
FX_DEVICE void add_to(float* dst, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(dst), "f"(a), "f"(b)
               : "memory");
#else
  atomicAdd(dst, a);
  atomicAdd(dst + 1, b);
#endif
}

// Whether add_async is there.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasAddAsync = true;
#else
inline constexpr bool kHasAddAsync = false;
#endif

// Makes what this thread wrote to shared memory visible to add_async, before the barrier that
// tells its caller.
FX_DEVICE void publish_to_add_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// dst[i] += src[i], i < count, by the copy engine (PTX: cp.reduce.async.bulk) while the calling
// thread goes on. Both aligned to 16 bytes, count a multiple of 4.
FX_DEVICE void add_async(float* dst, const float* src_smem, int count) {
#if __CUDA_ARCH__ >= 900
  const uint32_t src = static_cast<uint32_t>(__cvta_generic_to_shared(src_smem));
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(dst),
      "r"(src), "r"(4 * count)
      : "memory");
#endif
}

// Waits until the calling thread's add_async have read their sources ...
FX_DEVICE void wait_add_async_read() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// ... or are done.
FX_DEVICE void wait_add_async() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

}  // namespace flash_ext
