// Every forward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "params.h"

namespace flash_ext {

inline constexpr int kFwdHeadDims[] = {32,  64,  96,
                                       128, 192, 256};  // others are filled up with zeros

struct FwdVariant {
  DType dtype;
  int head_dim;   // one of kFwdHeadDims, not below that of q nor of v
  bool few_rows;  // one tile holds all queries that share a KV head
  // Knows mask tensors, softcap, ALiBi, dropout, and rows that cannot be read 16 bytes at a time.
  // The others know what is left: causal, windows, sinks, packed sequences, any other strides.
  bool general;
  constexpr bool operator==(const FwdVariant&) const = default;
};

struct FwdTile {
  int block_q, block_kv, warps;
  int stages;           // 1: V is loaded during q k^T, the next K during p v; 2: a block ahead
  int blocks_per_sm;    // that the registers must leave room for
  bool q_in_regs;       // else q is read from shared memory again for each block of keys
  bool staged = false;  // float32: keys and values are copied a block ahead, and split later

  constexpr int rows_per_warp() const { return block_q / warps; }
  constexpr int smem_bytes(const FwdVariant& v) const {
    const int bytes = v.dtype == DType::f32 ? 6 : 2;  // as SharedTile::kBytes
    return ((block_q + 2 * stages * block_kv) * bytes + (staged ? 8 * block_kv : 0)) * v.head_dim;
  }
};

// float32: the general tiles, and those of few rows, fit 99 KB of shared memory (AMD: 64 KB, but for
// head_dim 256) and take the place of the plain ones where those do not fit: sm_80 from head_dim 128.
constexpr FwdTile fwd_tile_f32(FwdVariant v, bool amd) {
  if (v.few_rows) {
    const int blocks_per_sm = amd ? 1 : v.head_dim <= 64 ? 8 : v.head_dim <= 128 ? 4 : 2;
    return {16, 16, 1, 1, blocks_per_sm, v.head_dim <= 64, !amd && v.head_dim <= 192};
  }
  if (amd) {
    if (v.head_dim <= 96) return {64, v.head_dim <= 64 ? 32 : 16, 4, 1, 1, false};
    return {v.head_dim <= 128 ? 32 : 16, 16, v.head_dim <= 128 ? 2 : 1, 1, 1, false};
  }
  if (v.head_dim <= 64) return {128, 32, 4, 1, 2, false, true};
  if (v.general) {
    switch (v.head_dim) {
      case 96: return {64, 32, 4, 1, 1, false, true};
      case 128: return {64, 16, 4, 1, 1, false, true};
      case 192: return {32, 16, 2, 1, 1, false, true};
      default: return {32, 16, 2, 1, 1, false};
    }
  }
  switch (v.head_dim) {
    case 96: return {128, 32, 8, 1, 1, true, true};
    case 128: return {128, 32, 8, 1, 1, false, true};
    case 192: return {128, 16, 8, 1, 1, false, true};
    default: return {96, 16, 6, 1, 1, false, true};
  }
}

// The tiles of 16 bits fit 72 KB of shared memory (AMD: 64 KB), but for the plain one of head_dim 256
// with many rows: it needs 128 KB, and where there is less the general one takes its place.
constexpr FwdTile fwd_tile(FwdVariant v, bool amd) {
  if (v.dtype == DType::f32) return fwd_tile_f32(v, amd);
  if (amd) {  // never run there: chosen for no or few spilled registers, and two thread blocks in 64 KB
    const bool q_in_regs = v.head_dim <= (v.general ? 64 : 128);
    return {v.few_rows ? 16 : 64, 32, v.few_rows ? 1 : 4, 1, 1, q_in_regs};
  }
  const int block_kv = v.head_dim <= 128 ? 64 : 32;
  if (v.few_rows) return {16, 32, 1, 2, 6, v.head_dim <= 128};
  if (v.general) return {64, block_kv, 4, 1, 2, v.head_dim <= 128};
  switch (v.head_dim) {
    case 32:
    case 64: return {128, 64, 4, 2, 3, false};
    case 96: return {128, 64, 4, 2, 2, false};
    case 128: return {128, 32, 4, 2, 2, false};
    case 192: return {64, 64, 4, 1, 2, false};
    default: return {128, 64, 8, 1, 1, false};
  }
}

}  // namespace flash_ext
