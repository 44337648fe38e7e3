// What the kernel is told besides FwdArgs: how to find q, k and v. Made by fwd_launch.h.
#pragma once
#include <cuda.h>

#include "../attn/fwd_args.h"

namespace flash_ext::sm90 {

struct FwdArgs : flash_ext::FwdArgs {
  CUtensorMap q_map, k_map, v_map;  // [batch, head, row, col]; packed tensors are one batch
};

}  // namespace flash_ext::sm90
