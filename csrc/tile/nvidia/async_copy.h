// cp.async (sm_80 and newer).
#pragma once
#include "../platform.h"

namespace flash_ext {

// Writes 16 bytes to dst_smem: the first `bytes` of src_gmem, then zeros. Both 16-byte aligned;
// nothing beyond `bytes` is read.
FX_DEVICE void copy_async(void* dst_smem, const void* src_gmem, int bytes) {
  ptx::cp_async(dst_smem, src_gmem, bytes);
}

// Writes 16 bytes to dst_smem: those of src_gmem, or zeros where they are not there to be read. Both
// 16-byte aligned. Cheaper than a number of bytes.
FX_DEVICE void copy_async_if(bool there, void* dst_smem, const void* src_gmem) {
  ptx::cp_async_if(there, dst_smem, src_gmem);
}

// Ends a group of copies.
FX_DEVICE void copy_commit() { ptx::cp_async_commit_group(); }

// Waits until at most kNewest of this thread's groups are still under way. A barrier must follow
// before other threads' copies are read.
template <int kNewest>
FX_DEVICE void copy_wait() {
  ptx::cp_async_wait_group<kNewest>();
}

}  // namespace flash_ext
