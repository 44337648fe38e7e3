// Every Hopper backward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "options.h"

namespace flash_ext::sm90 {

// Products have these widths; others are filled up with zeros on the way to shared memory.
// 192 and 256: bwd_wide_variants.h.
inline constexpr int kBwdHeadDims[] = {64, 80, 96, 128, 192, 256};

struct BwdTile {
  int block_q;           // query rows of a block
  int q_stages;          // blocks of q in shared memory
  int grad_stages;       // ... of grad_o
  bool early_dv;         // dv's product runs while the scores' gradients are computed
  bool ds_in_registers;  // dk's product has them from there, else from shared memory

  // A warpgroup has 64 keys, of which its registers hold dk and dv.
  static constexpr int warpgroups = 2, block_kv = 64 * warpgroups;
  // See FwdTile.
  static constexpr int loader_registers = 24, registers = 240;
};

// Besides dk and dv registers hold the scores of a block of rows, or already the next one's; in turn the
// weights' gradients and a part of dq; and weights in 16 bits. So not everything fits everywhere.
// Options run a block's products one after the other.
constexpr BwdTile bwd_tile(int head_dim, Options options) {
  if (options != Options::none) return {head_dim == 64 ? 128 : 64, 2, 2, false, true};
  if (head_dim == 64) return {128, 3, 2, false, false};
  if (head_dim == 128) return {64, 3, 2, true, false};
  return {64, 3, 3, true, true};
}

}  // namespace flash_ext::sm90
