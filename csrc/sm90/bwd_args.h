// What the backward kernel is told besides BwdArgs: how to find its operands.
#pragma once
#include <cuda.h>

#include "../attn/bwd_args.h"
#include "../attn/seen_keys.h"

namespace flash_ext::sm90 {

// A group's tensors are those of a KV head; its query heads follow each other, so pack is 1.
struct BwdArgs : flash_ext::BwdArgs {
  int heads_of_group = 1;
  SeenKeys seen;                                // of a bool mask; without ranges: not known
  CUtensorMap q_map, k_map, v_map, grad_o_map;  // as in FwdArgs
};

}  // namespace flash_ext::sm90
