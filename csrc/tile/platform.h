// Which target is being compiled, and the few words whose spelling differs.
#pragma once
#include <cstdint>
#include <type_traits>

#if defined(__HIP__)
#define FX_AMD 1
#else
#define FX_AMD 0
#endif

#define FX_DEVICE __device__ __forceinline__
#define FX_HOST_DEVICE __host__ __device__ __forceinline__

#if !FX_AMD
#include "nvidia/ptx.h"
#endif

namespace flash_ext {

inline constexpr bool kAmd = FX_AMD;

#if FX_AMD && defined(__GFX9__)
inline constexpr int kWarpSize = 64;  // device code only: a HIP host pass cannot know it
#else
inline constexpr int kWarpSize = 32;
#endif

FX_DEVICE unsigned lane_id() { return threadIdx.x % kWarpSize; }
FX_DEVICE unsigned warp_id() { return threadIdx.x / kWarpSize; }

// Value held by the lane whose id differs from ours in the bits of `mask`.
template <typename X>
FX_DEVICE X shuffle_xor(X x, int mask) {
#if FX_AMD
  return __shfl_xor(x, mask, kWarpSize);
#else
  return __shfl_xor_sync(0xffffffffu, x, mask, 32);
#endif
}

// Whether the condition holds in any lane of the warp.
FX_DEVICE bool any_lane(bool condition) {
#if FX_AMD
  return __any(condition);
#else
  return __any_sync(0xffffffffu, condition);
#endif
}

// 2^x by the special-function unit, exact to about 2 units in the last place; denormals are zero.
FX_DEVICE float fast_exp2(float x) {
#if FX_AMD
  return __builtin_amdgcn_exp2f(x);
#else
  return ptx::ex2(x);
#endif
}

// 1 / x likewise.
FX_DEVICE float fast_reciprocal(float x) {
#if FX_AMD
  return 1.f / x;
#else
  return ptx::rcp(x);
#endif
}

// Exact to 2^-22 of 1: as 1 - 2 / (1 + e^2x).
FX_DEVICE float fast_tanh(float x) {
  return 1.f - 2.f * fast_reciprocal(1.f + fast_exp2(x * 2.885390082f));
}

FX_DEVICE float to_float(float x) { return x; }
FX_DEVICE float to_float(double x) { return static_cast<float>(x); }
FX_DEVICE float to_float(half_t x) { return __half2float(x); }
FX_DEVICE float to_float(bf16_t x) { return __bfloat162float(x); }

template <typename T>
FX_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  else if constexpr (std::is_same_v<T, half_t>) return __float2half(x);
  else return __float2bfloat16(x);
}

}  // namespace flash_ext
