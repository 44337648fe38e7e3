// The copies that NVIDIA's GPUs make in the background, and what else only they have.
#pragma once
#include <cstdint>

namespace simt {

#if defined(FX_EMULATE_SM90)
inline constexpr bool kSm90 = true;
#else
inline constexpr bool kSm90 = false;
#endif

// The destination holds NaN until the calling thread waits for the copy.
void cp_async(void* dst_smem, const void* src, int bytes);
void cp_async_commit_group();
void cp_async_wait_group(int newest);

// Reads its source when the calling thread waits for it.
void cp_reduce_async_bulk_add(float* dst, const float* src_smem, int bytes);
void cp_async_bulk_wait_group();
void fence_proxy_async();

}  // namespace simt
