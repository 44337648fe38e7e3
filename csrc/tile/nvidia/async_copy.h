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
  const uint32_t dst = static_cast<uint32_t>(__cvta_generic_to_shared(dst_smem));
  asm volatile(
      "{\n.reg .pred absent;\nsetp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;\n}" ::"r"(dst),
      "l"(src_gmem), "r"(static_cast<uint32_t>(there))
      : "memory");
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
