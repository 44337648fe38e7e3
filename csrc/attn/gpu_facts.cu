#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "gpu_facts.h"

namespace flash_ext {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  FX_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

}  // namespace

GpuFacts gpu_facts(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  return {
      attribute(cudaDevAttrMultiProcessorCount, device),
      attribute(cudaDevAttrWarpSize, device),
      attribute(kAmd ? cudaDevAttrMaxSharedMemoryPerBlock : cudaDevAttrMaxSharedMemoryPerBlockOptin,
                device),
      attribute(cudaDevAttrL2CacheSize, device),
      !kAmd && major >= 9,
      !kAmd && major == 9 && minor == 0};
}

CurrentDevice::CurrentDevice(int device) : previous(device) {
  FX_CUDA_CHECK(cudaGetDevice(&previous));
  if (previous != device) FX_CUDA_CHECK(cudaSetDevice(device));
}

CurrentDevice::~CurrentDevice() {
  int now = previous;
  if (cudaGetDevice(&now) == cudaSuccess && now != previous) (void)cudaSetDevice(previous);
}

}  // namespace flash_ext
