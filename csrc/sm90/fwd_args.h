// What the kernel is told besides FwdArgs: how to find q, k and v, and who takes which tile.
#pragma once
#include <cuda.h>

#include "../attn/fwd_args.h"

namespace flash_ext::sm90 {

struct FwdArgs : flash_ext::FwdArgs {
  // How many tiles are taken, zero at first; null: tiles are dealt out beforehand.
  unsigned* taken = nullptr;
  bool turns = true;                // warpgroups start their products one after the other
  CUtensorMap q_map, k_map, v_map;  // [batch, head, row, col]; packed tensors are one batch
};

}  // namespace flash_ext::sm90
