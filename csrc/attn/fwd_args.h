// What the forward kernel is told besides AttnParams: how the work is cut. Made by fwd.cu.
#pragma once
#include "divisor.h"
#include "params.h"
#include "seen_keys.h"

namespace flash_ext {

inline constexpr int kMostSplits = 128;

struct FwdArgs {
  AttnParams params;
  // Heads that share a KV head and are packed into one tile: row r is query r / pack of the
  // (r % pack)-th of them. 1: a tile is of one head.
  Divisor pack;
  int blocks_q = 0;           // tiles that the longest sequence's rows fill
  int64_t heads = 0;          // batch * heads_q / pack
  int heads_at_once = 1;      // whose K and V stay in the L2 cache together
  bool longest_last = false;  // the last rows see the most keys, and are started first
  SeenKeys seen;              // of a bool mask; without ranges: not known
  // The keys of a tile are divided among `splits` thread blocks, whose results combine.cu merges.
  int splits = 1;
  float* o_partial = nullptr;    // [splits, rows, partial_cols], a row being its index in lse
  float* lse_partial = nullptr;  // [splits, rows], to base 2
  int64_t partial_rows = 0;
  int partial_cols = 0;  // head_dim_v, rounded up to 4
};

}  // namespace flash_ext
