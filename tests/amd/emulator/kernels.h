// What a library of emulated kernels offers to the binding.
#pragma once
#include <cstdint>

#include "attn/params.h"

namespace simt {

struct Kernels {
  void (*set_order)(uint64_t order);  // see simt.h
  // Returns into how many parts the keys were divided.
  int (*attn_fwd)(const flash_ext::AttnParams& params, int multiprocessors);
  void (*attn_bwd)(const flash_ext::AttnBwdParams& params, int multiprocessors, bool deterministic);
};

}  // namespace simt

extern "C" simt::Kernels emulated_kernels();
