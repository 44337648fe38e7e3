// Every Hopper forward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "options.h"

namespace flash_ext::sm90 {

// Products have these widths; others are filled up with zeros on the way to shared memory.
inline constexpr int kFwdHeadDims[] = {32, 64, 80, 96, 128, 192, 256};

struct FwdTile {
  int warpgroups;  // that compute, of 64 rows each; one more feeds them
  int block_kv;    // keys of a block
  int stages;      // blocks of keys, and of values, in shared memory
  int q_stages;    // 2: the next tile's q is loaded meanwhile

  constexpr bool operator==(const FwdTile&) const = default;
  constexpr int block_q() const { return 64 * warpgroups; }
  // Registers of each thread that computes, and of those that load. All are dealt out in eights; when
  // the kernel starts, every thread has the same number. Asking for more than there are would hang.
  constexpr int registers_at_start() const { return 512 / (warpgroups + 1) / 8 * 8; }
  constexpr int loader_registers() const { return warpgroups == 2 ? 40 : 32; }
  constexpr int registers() const {
    const int all = registers_at_start() * (warpgroups + 1);
    return (all - loader_registers()) / warpgroups / 8 * 8;
  }
};

// A warpgroup's registers hold scores and output in float32 and the weights in 16 bits: per row
// block_kv + head_dim + block_kv / 2 of its 4 * registers. With options come the elements of a mask
// tensor, another block_kv / 2. Three warpgroups hide weights behind products better than two and read
// keys and values once for 192 rows. even: tiles whose rows are a power of two, for short sequences,
// which 192 rows fit badly, and at head_dim 64 for bands, of which blocks of 64 keys waste less.
constexpr FwdTile fwd_tile(int head_dim, Options options, bool even) {
  const bool plain = options == Options::none;
  switch (head_dim) {
    case 32: return plain ? FwdTile{4, 64, 4, 2} : FwdTile{3, 96, 3, 2};
    case 64:
      if (!plain) return {3, 96, 3, 2};
      return even ? FwdTile{4, 64, 4, 2} : FwdTile{3, 128, 3, 2};
    case 80: return plain ? FwdTile{3, 112, 2, 2} : FwdTile{2, 128, 2, 1};
    case 96: return plain ? FwdTile{3, 96, 2, 2} : FwdTile{2, 128, 2, 1};
    case 128: return plain && !even ? FwdTile{3, 64, 4, 2} : FwdTile{2, 128, 2, 2};
    // Shared memory ends here.
    case 192: return plain ? FwdTile{2, 96, 2, 1} : FwdTile{2, 80, 2, 1};
    default: return plain ? FwdTile{2, 80, 2, 1} : FwdTile{2, 64, 2, 1};
  }
}

}  // namespace flash_ext::sm90
