// For .cu files: an exception where a call of the GPU's runtime fails.
#pragma once
#include "checks.h"

#define FX_CUDA_CHECK(call)                                                                \
  do {                                                                                     \
    const auto status = (call);                                                            \
    FX_CHECK(status == cudaSuccess, "flash_ext on the GPU: ", cudaGetErrorString(status)); \
  } while (false)
