// Every Hopper forward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "../attn/params.h"

namespace flash_ext::sm90 {

// Products have these widths; others are filled up with zeros on the way to shared memory.
inline constexpr int kFwdHeadDims[] = {64, 96, 128, 192, 256};

struct FwdTile {
  int warpgroups;         // that compute, of 64 rows each; one more feeds them
  int block_kv;           // keys of a block
  int stages;             // blocks of keys, and of values, in shared memory
  int q_stages;           // 2: the next tile's q is loaded meanwhile
  bool take_turns;        // one warpgroup's products run while another computes weights
  bool early = true;      // the next scores are computed before the weights of these, not after
  int by_polynomial = 0;  // of 16 weights, so many are computed without the special-function unit

  // Of each thread. A multiprocessor has 512 for each of 128 threads; the allotment is in eights.
  constexpr int registers() const { return warpgroups == 2 ? 240 : 160; }
  constexpr int producer_registers() const { return warpgroups == 2 ? 24 : 32; }
};

constexpr FwdTile fwd_tile(int head_dim) {
  switch (head_dim) {
    case 64: return {3, 128, 2, 1, true};
    case 96: return {2, 128, 2, 1, true};
    case 128: return {2, 128, 2, 1, true};
    case 192: return {2, 112, 2, 1, true};
    default: return {2, 80, 2, 1, true};
  }
}

}  // namespace flash_ext::sm90
