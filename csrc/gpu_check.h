// For .cu files: an exception where a call of the GPU's runtime fails, and what each launch needs.
#pragma once
#include <array>
#include <atomic>

#include "checks.h"

#define FX_CUDA_CHECK(call)                                                                \
  do {                                                                                     \
    const auto status = (call);                                                            \
    FX_CHECK(status == cudaSuccess, "flash_ext on the GPU: ", cudaGetErrorString(status)); \
  } while (false)

namespace flash_ext {

// Lets a kernel have this much shared memory on the current device. Later launches find it done.
template <auto kKernel>
void allow_shared_memory(int bytes) {
  constexpr int kMostDevices = 64;
  static std::array<std::atomic<bool>, kMostDevices> allowed;
  int device = 0;
  FX_CUDA_CHECK(cudaGetDevice(&device));
  if (device < kMostDevices && allowed[device].load(std::memory_order_relaxed)) return;
  FX_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (device < kMostDevices) allowed[device].store(true, std::memory_order_relaxed);
}

}  // namespace flash_ext
