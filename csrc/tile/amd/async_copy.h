// Through registers: the copy is done when the call returns.
#pragma once
#include "../platform.h"

namespace flash_ext {

// Writes 16 bytes to dst_smem: the first `bytes` of src_gmem, then zeros. Both 16-byte aligned;
// nothing beyond `bytes` is read.
FX_DEVICE void copy_async(void* dst_smem, const void* src_gmem, int bytes) {
  uint4 chunk = {};
  if (bytes == 16) {
    chunk = *static_cast<const uint4*>(src_gmem);
  } else {
    const uint16_t* src = static_cast<const uint16_t*>(src_gmem);
    uint32_t word[4] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (2 * i < bytes) word[i / 2] |= uint32_t{src[i]} << (16 * (i % 2));
    chunk = {word[0], word[1], word[2], word[3]};
  }
  *static_cast<uint4*>(dst_smem) = chunk;
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
