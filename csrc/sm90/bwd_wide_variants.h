// Every Hopper backward kernel of wide heads that is compiled, and the size of its tiles.
#pragma once
#include "options.h"

namespace flash_ext::sm90 {

// Where dk and dv of 64 keys do not fit the registers of a warpgroup.
constexpr bool is_wide(int head_dim) { return head_dim > 128; }

// Of the kernel for dk and dv: 64 keys, and blocks of 64 rows. dk fills the registers of a warpgroup,
// dv those of another.
struct DkvTile {
  int q_stages;       // blocks of q in shared memory
  int grad_stages;    // ... of grad_o
  int weight_stages;  // ... of weights, on their way from one warpgroup to the other

  static constexpr int block_q = 64, block_kv = 64;
};

// Of the kernel for dq: 64 rows for each of two warpgroups.
struct DqTile {
  int block_kv;  // keys of a block
  int k_stages;  // blocks of k in shared memory
  int v_stages;  // ... of v

  static constexpr int warpgroups = 2, block_q = 64 * warpgroups;
};

// See FwdTile.
inline constexpr int kWideLoaderRegisters = 24, kWideRegisters = 240;

constexpr DkvTile dkv_tile(int head_dim) {
  if (head_dim == 192) return {3, 3, 2};
  return {2, 2, 2};
}

// With options registers also hold a mask's elements and softcap's slopes, in 16 bits each; dq leaves no
// room for them beside as many keys.
constexpr DqTile dq_tile(int head_dim, Options options) {
  if (options != Options::none) return head_dim == 192 ? DqTile{64, 2, 2} : DqTile{48, 2, 2};
  if (head_dim == 192) return {80, 2, 2};
  return {64, 2, 1};
}

}  // namespace flash_ext::sm90
