// Every Hopper backward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "../attn/params.h"

namespace flash_ext::sm90 {

// Products have these widths; others are filled up with zeros on the way to shared memory.
inline constexpr int kBwdHeadDims[] = {64, 96, 128};

struct BwdTile {
  int block_q;      // query rows of a block; a thread block has 128 keys, 64 a warpgroup
  int q_stages;     // blocks of q in shared memory
  int grad_stages;  // ... of grad_o
  bool early_dv;
  bool ahead;       // the next block's scores are computed together with this one's gradients

  static constexpr int warpgroups = 2, block_kv = 64 * warpgroups;
  // See FwdTile.
  static constexpr int loader_registers = 24, registers = 240;
};

// A warpgroup's registers hold dk and dv of its keys, and of a block of rows the weights and their
// gradients in float32 and in 16 bits, and a half of dq.
constexpr BwdTile bwd_tile(int head_dim) {
  switch (head_dim) {
    case 64: return {128, 2, 2, false, false};
    default: return {64, 2, 2, true, true};
  }
}

}  // namespace flash_ext::sm90
