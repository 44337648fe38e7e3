// Every backward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "fwd_variants.h"

namespace flash_ext {

struct BwdVariant {
  DType dtype;
  int head_dim;  // one of kFwdHeadDims, not below that of q nor of v
  bool general;  // as in FwdVariant
  constexpr bool operator==(const BwdVariant&) const = default;
};

struct BwdTile {
  int block_kv, block_q;
  // A warp owns block_kv / warps_kv keys, and of their dk and dv every warps_d-th 16 columns. With
  // warps_d above 1 each computes some rows' weights, which reach the others by shared memory.
  int warps_kv, warps_d;
  int cols;              // query rows a warp computes scores of at a time: they are in registers
  int stages;            // 2: q and grad_o are loaded a block ahead
  int dq_rows, dq_cols;  // of dq, what a warp computes at a time; the columns again every so many
  int blocks_per_sm;     // that the registers must leave room for

  constexpr int warps() const { return warps_kv * warps_d; }
  constexpr int keys_per_warp() const { return block_kv / warps_kv; }
  constexpr int smem_bytes(int head_dim, bool general) const {
    const int tiles = (2 * block_kv + 2 * stages * block_q) * head_dim * 2;
    const int weights = (warps_d > 1 ? 2 : 1) * block_kv * block_q * 2;
    return tiles + weights + block_q * (general ? 48 : 16) + 32;
  }
};

// The general tiles fit 99 KB of shared memory (AMD: 64 KB).
constexpr BwdTile bwd_tile(BwdVariant v, bool amd) {
  if (amd) {
    if (v.head_dim <= 96) return {64, 64, 4, 1, 32, 1, 16, 32, 1};
    if (v.head_dim == 128) return {64, 32, 4, 1, 32, 1, 16, 32, 1};
    if (v.head_dim == 192) return {32, 32, 2, 1, 16, 1, 16, 32, 1};
    return {16, 32, 1, 2, 16, 1, 16, 32, 1};
  }
  if (v.general) {
    if (v.head_dim <= 128) return {64, 64, 4, 1, 32, 1, 16, 32, 1};
    if (v.head_dim == 192) return {64, 32, 4, 1, 16, 1, 16, 32, 1};
    return {32, 32, 2, 2, 16, 1, 16, 64, 1};
  }
  switch (v.head_dim) {
    case 32: return {128, 128, 4, 1, 32, 2, 32, 32, 2};
    case 64: return {128, 64, 4, 1, 32, 2, 32, 32, 2};
    case 96: return {64, 64, 2, 2, 32, 2, 32, 48, 2};
    case 128: return {128, 64, 4, 2, 32, 2, 32, 32, 1};
    case 192: return {64, 64, 2, 4, 16, 2, 32, 48, 1};
    default: return {64, 64, 2, 4, 16, 2, 32, 64, 1};
  }
}

}  // namespace flash_ext
