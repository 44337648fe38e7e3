// What a library of emulated kernels offers to the binding.
#pragma once
#include <cstdint>

#include "attn/params.h"

namespace simt {

struct Kernels {
  void (*set_order)(uint64_t order);  // see simt.h
  // Both return into how many parts the keys were divided.
  int (*attn_fwd)(const flash_ext::AttnParams& params, int multiprocessors);
};

}  // namespace simt

extern "C" simt::Kernels emulated_kernels();
