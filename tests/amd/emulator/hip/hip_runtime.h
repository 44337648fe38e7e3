// As much of HIP as flash_ext's kernels use, for the lane emulator.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../matrix.h"
#include "../simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ constinit thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (simt::self->thread)
#define blockIdx (simt::block)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define hipLaunchKernelGGL(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(grid, block, shared_bytes, [&] { kernel(__VA_ARGS__); })

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { simt::barrier(); }

template <typename T>
T __shfl_xor(T x, int mask, int width) {
  const simt::Deposits& all = simt::exchange("__shfl_xor", &x, sizeof x, false);
  const unsigned from = simt::self->lane ^ mask;
  if (mask >= width || !all.has(from)) simt::fail("__shfl_xor: no lane %u", from);
  T y;
  std::memcpy(&y, all.of[from], sizeof y);
  return y;
}

inline int __any(int condition) {
  const simt::Deposits& all = simt::exchange("__any", &condition, sizeof condition, false);
  for (unsigned lane = 0; lane < simt::kWave; ++lane)
    if (int theirs; all.has(lane)) {
      std::memcpy(&theirs, all.of[lane], sizeof theirs);
      if (theirs) return 1;
    }
  return 0;
}

// CUDA's names: sources of NVIDIA's kernels are hipified, too, and compiled without __HIP__.
template <typename T>
T __shfl_xor_sync(unsigned, T x, int mask, int width) {
  return __shfl_xor(x, mask, width);
}
inline int __any_sync(unsigned, int condition) { return __any(condition); }
inline void __threadfence() {}

inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }

inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __clz(uint32_t bits) { return bits ? __builtin_clz(bits) : 32; }
inline void atomicMin(int* least, int x) { *least = x < *least ? x : *least; }
inline void atomicMax(int* most, int x) { *most = x > *most ? x : *most; }
inline float atomicAdd(float* sum, float x) {
  const float before = *sum;
  *sum = before + x;
  return before;
}

// Thread blocks run one after the other: there is nothing to wait for.
#define __HIP_MEMORY_SCOPE_AGENT 0
#define __hip_atomic_load(src, ...) simt::load_without_waiting(src)
#define __hip_atomic_store(dst, x, ...) (void)(*(dst) = (x))

inline float unsafeAtomicAdd(float* sum, float x) { return atomicAdd(sum, x); }

inline float __builtin_amdgcn_exp2f(float x) {  // denormals are zero
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
}

// The host's part.
using hipStream_t = void*;
enum hipError_t { hipSuccess };
enum hipDeviceAttribute_t {
  hipDeviceAttributeMultiprocessorCount,
  hipDeviceAttributeWarpSize,
  hipDeviceAttributeMaxSharedMemoryPerBlock,
  hipDeviceAttributeL2CacheSize,
  hipDeviceAttributeComputeCapabilityMajor,
  hipDeviceAttributeComputeCapabilityMinor
};
enum hipFuncAttribute { hipFuncAttributeMaxDynamicSharedMemorySize };
inline const char* hipGetErrorString(hipError_t) { return ""; }
inline hipError_t hipGetLastError() { return hipSuccess; }
inline hipError_t hipFuncSetAttribute(const void*, hipFuncAttribute, int) { return hipSuccess; }
inline hipError_t hipGetDevice(int* device) { return *device = 0, hipSuccess; }
inline hipError_t hipSetDevice(int) { return hipSuccess; }
inline hipError_t hipDeviceGetAttribute(int* value, hipDeviceAttribute_t which, int) {
  const int values[] = {1, simt::kWave, simt::kMostShared, 4 << 20, 9};
  return *value = values[which], hipSuccess;
}
inline hipError_t hipMemsetAsync(void* to, int value, size_t bytes, hipStream_t) {
  std::memset(to, value, bytes);
  return hipSuccess;
}
