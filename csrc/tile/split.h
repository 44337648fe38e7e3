// float32 as a sum of three bfloat16 numbers, which is what lets matrix units of 16-bit numbers work
// on it: the eight bits of significand of each are the 24 of a float32.
#pragma once
#include "platform.h"

namespace flash_ext {

inline constexpr int kParts = 3;

// Each part is exactly a bfloat16, and at most 2^-7 and 2^-8 of the part before it. What is not
// finite is the last part alone: of a product's terms only one, with the other factor's first part,
// holds it then, so that infinity times x is an infinity of x's sign.
struct Split {
  float part[kParts];
};

// kFinite: x is known to be no infinity, or what becomes NaN where it is one; NaN stays NaN.
template <bool kFinite = false>
FX_DEVICE Split split(float x) {
  constexpr uint32_t kKept = 0xffff0000u, kHalf = 0x8000u;
  const bool finite = kFinite || fabsf(x) < INFINITY;
  // Rounded towards zero, the first part cannot overflow; the second is rounded to nearest, so that
  // the terms left out of a product have either sign.
  const float first = __uint_as_float(__float_as_uint(finite ? x : 0.f) & kKept);
  const float rest = x - first;
  const float rounded = __uint_as_float((__float_as_uint(rest) + kHalf) & kKept);
  const float second = finite ? rounded : 0.f;
  return {{first, second, rest - second}};
}

// Two parts as neighbouring bfloat16 numbers.
FX_DEVICE uint32_t pack_parts(float low, float high) {
  return __float_as_uint(low) >> 16 | (__float_as_uint(high) & 0xffff0000u);
}

// Undoes split and pack_parts: the lower and the upper number of three pairs.
FX_DEVICE float join_low(uint32_t first, uint32_t second, uint32_t third) {
  return __uint_as_float(first << 16) + __uint_as_float(second << 16) +
         __uint_as_float(third << 16);
}
FX_DEVICE float join_high(uint32_t first, uint32_t second, uint32_t third) {
  return join_low(first >> 16, second >> 16, third >> 16);
}

}  // namespace flash_ext
