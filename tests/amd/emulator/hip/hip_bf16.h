#pragma once
#include "hip_runtime.h"

struct __hip_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__hip_bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}
inline __hip_bfloat16 __float2bfloat16(float x) {
  return {__builtin_bit_cast(uint16_t, static_cast<__bf16>(x))};
}
