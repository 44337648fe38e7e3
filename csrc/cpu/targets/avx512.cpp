#include "prelude.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FX_ISA avx512
#include "../simd/avx512.h"

#include "../table.h"

const flash_ext::cpu::Kernels& flash_ext::cpu::avx512::kernels(DType dtype) {
  return plain_kernels(dtype);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
