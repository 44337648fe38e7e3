// Every backward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "params.h"

namespace flash_ext {

struct BwdVariant {
  DType dtype;
  int head_dim;  // one of kHeadDims, see plan.h, not below that of q nor of v
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
  bool async_dq;         // dq is added by the copy engine where there is one, from shared memory

  constexpr int warps() const { return warps_kv * warps_d; }
  constexpr int keys_per_warp() const { return block_kv / warps_kv; }
  constexpr int smem_bytes(const BwdVariant& v, bool adds_async) const {
    const int bytes = v.dtype == DType::f32 ? 6 : 2;  // as SharedTile::kBytes
    const int tiles = (2 * block_kv + 2 * stages * block_q) * v.head_dim * bytes;
    const int weights = (warps_d > 1 ? 2 : 1) * block_kv * block_q * bytes;
    const int dq = async_dq && adds_async ? block_q * v.head_dim * 4 : 0;
    return tiles + weights + dq + block_q * (v.general ? 56 : 16);
  }
};

// float32: six products for one, and three times the memory.
constexpr BwdTile bwd_tile_f32(BwdVariant v, bool amd) {
  if (amd) {
    if (v.head_dim <= 64) return {32, 32, 2, 1, 16, 1, 16, v.head_dim, 1, false};
    return {16, 16, 1, 1, 16, 1, 16, v.head_dim / (v.head_dim == 96 ? 2 : 4), 1, false};
  }
  switch (v.head_dim) {
    case 32: return {64, 64, 4, 1, 32, 1, 16, 32, 2, false};
    case 64: return {64, 32, 4, 1, 32, 1, 16, 32, 2, false};
    case 96: return {32, 32, 2, 2, 16, 1, 16, 48, 2, false};
    case 128:
      if (v.general) return {32, 16, 2, 1, 16, 1, 16, 64, 1, false};
      return {64, 32, 4, 2, 16, 1, 16, 32, 1, false};
    default:
      if (v.general) return {16, 16, 1, 1, 16, 1, 16, v.head_dim / 4, 1, false};
      if (v.head_dim == 192) return {32, 32, 2, 2, 16, 1, 32, 48, 1, false};
      return {32, 32, 2, 2, 16, 1, 16, 64, 1, false};
  }
}

// The general tiles fit 99 KB of shared memory (AMD: 64 KB).
constexpr BwdTile bwd_tile(BwdVariant v, bool amd) {
  if (v.dtype == DType::f32) return bwd_tile_f32(v, amd);
  if (amd) {  // never run there: chosen for no or few spilled registers
    if (v.head_dim == 32) return {64, 64, 4, 1, 32, 1, 16, 32, 1, false};
    if (v.head_dim == 64) return {64, 64, 4, 1, v.general ? 16 : 32, 1, 16, 64, 1, false};
    if (v.head_dim == 96) return {32, 32, 2, 2, 16, 1, 16, 48, 1, false};
    if (v.head_dim == 128) return {64, 32, 4, 2, 16, 1, 16, 32, 1, false};
    if (v.head_dim == 192) return {32, 32, 2, 2, 16, 1, 16, 96, 1, false};
    return {16, 32, 1, 2, 16, 1, 16, 32, 1, false};
  }
  if (v.general) {
    if (v.head_dim <= 128) return {64, 64, 4, 1, 32, 1, 16, v.head_dim, 1, false};
    if (v.head_dim == 192) return {64, 32, 4, 1, 16, 1, 16, 96, 1, false};
    return {32, 32, 2, 2, 16, 1, 16, 64, 1, false};
  }
  switch (v.head_dim) {
    case 32: return {128, 128, 4, 1, 32, 2, 32, 32, 2, true};
    case 64: return {128, 64, 4, 1, 32, 2, 32, 32, 2, true};
    case 96: return {64, 64, 2, 2, 32, 2, 32, 48, 2, true};
    case 128: return {128, 64, 4, 2, 32, 2, 32, 32, 1, true};
    case 192: return {64, 64, 2, 4, 16, 2, 32, 48, 1, true};
    default: return {64, 64, 2, 4, 16, 1, 32, 64, 1, true};
  }
}

}  // namespace flash_ext
