// The matrix instructions, by the tables of AMD's ISA manuals: which lane holds which element.
#pragma once
#include "simt.h"

namespace simt {

#if defined(__GFX9__)
inline constexpr int kOperandRegs = 4, kAccRegs = 4;
#elif defined(__GFX12__)
inline constexpr int kOperandRegs = 8, kAccRegs = 8;
#else
inline constexpr int kOperandRegs = 16, kAccRegs = 8;
#endif

using Half = _Float16 __attribute__((ext_vector_type(kOperandRegs)));
using Bf16Bits = short __attribute__((ext_vector_type(kOperandRegs)));
using Acc = float __attribute__((ext_vector_type(kAccRegs)));

// d = a b + c; a is [16, 16] with a row a lane, b with a column a lane.
Acc multiply_f16(Half a, Half b, Acc c);
Acc multiply_bf16(Bf16Bits a, Bf16Bits b, Acc c);

}  // namespace simt

#if defined(__GFX9__)
inline simt::Acc __builtin_amdgcn_mfma_f32_16x16x16f16(simt::Half a, simt::Half b, simt::Acc c, int,
                                                       int, int) {
  return simt::multiply_f16(a, b, c);
}
inline simt::Acc __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(simt::Bf16Bits a, simt::Bf16Bits b,
                                                           simt::Acc c, int, int, int) {
  return simt::multiply_bf16(a, b, c);
}
#elif defined(__GFX12__)
inline simt::Acc __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(simt::Half a, simt::Half b,
                                                                  simt::Acc c) {
  return simt::multiply_f16(a, b, c);
}
inline simt::Acc __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(simt::Bf16Bits a,
                                                                   simt::Bf16Bits b, simt::Acc c) {
  return simt::multiply_bf16(a, b, c);
}
#else
inline simt::Acc __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(simt::Half a, simt::Half b,
                                                            simt::Acc c) {
  return simt::multiply_f16(a, b, c);
}
inline simt::Acc __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(simt::Bf16Bits a, simt::Bf16Bits b,
                                                             simt::Acc c) {
  return simt::multiply_bf16(a, b, c);
}
#endif
