// One function a target: its kernels for a storage type.
#pragma once
#include "../kernels.h"

namespace flash_ext::cpu {

namespace generic { const Kernels& kernels(DType); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& kernels(DType); }
namespace avx512 { const Kernels& kernels(DType); }
namespace avx512_bf16 { const Kernels& bf16_kernels(); }
#endif

}  // namespace flash_ext::cpu
