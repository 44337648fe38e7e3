#include "prelude.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FX_ISA avx512_bf16
#include "../simd/avx512.h"

#include "../simd/bf16_dot.h"
#include "../table.h"

const flash_ext::cpu::Kernels& flash_ext::cpu::avx512_bf16::bf16_kernels() {
  return kKernels<bf16_t, Bf16DotMath>;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
