// Through registers: the copy is done when the call returns.
#pragma once
#include "../platform.h"

namespace flash_ext {

// Writes 16 bytes to dst_smem: the first `bytes` (even) of src_gmem, then zeros. Both 16-byte aligned;
// src_gmem is read whole, without a branch, so that many copies are under way together.
FX_DEVICE void copy_async(void* dst_smem, const void* src_gmem, int bytes) {
  const uint4 chunk = *static_cast<const uint4*>(src_gmem);
  const auto kept = [bytes](int word) {  // which of its bits
    return bytes >= 4 * word + 4 ? 0xffffffffu : bytes > 4 * word ? 0xffffu : 0u;
  };
  *static_cast<uint4*>(dst_smem) = {chunk.x & kept(0), chunk.y & kept(1), chunk.z & kept(2),
                                    chunk.w & kept(3)};
}

// Writes 16 bytes to dst_smem: those of src_gmem, or zeros where they are not there to be read. Both
// 16-byte aligned.
FX_DEVICE void copy_async_if(bool there, void* dst_smem, const void* src_gmem) {
  *static_cast<uint4*>(dst_smem) = there ? *static_cast<const uint4*>(src_gmem) : uint4{};
}

FX_DEVICE void copy_commit() {}

template <int kNewest>
FX_DEVICE void copy_wait() {}

}  // namespace flash_ext
