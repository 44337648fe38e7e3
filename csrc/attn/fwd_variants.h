// Every forward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "params.h"

namespace flash_ext {

// few, some: one tile holds all queries that share a KV head.
enum class FwdRows { few, some, many };

struct FwdVariant {
  DType dtype;
  int head_dim;  // one of kHeadDims, see plan.h, not below that of q nor of v
  FwdRows rows;
  // Knows mask tensors, softcap, ALiBi, dropout, and rows that cannot be read 16 bytes at a time.
  // The others know what is left: causal, windows, sinks, packed sequences, any other strides.
  bool general;
  constexpr bool operator==(const FwdVariant&) const = default;
  // Where the tile of many rows is no larger, there is none for some.
  constexpr bool compiled() const {
    return rows != FwdRows::some || (!general && dtype != DType::f32 && head_dim <= 128);
  }
};

struct FwdTile {
  int block_q, block_kv, warps;
  int stages;           // 1: V is loaded during q k^T, the next K during p v; 2: a block ahead
  int blocks_per_sm;    // that the registers must leave room for
  bool q_in_regs;       // else q is read from shared memory again for each block of keys
  bool staged = false;  // float32: keys and values are copied a block ahead, and split later
  // The time goes into issuing instructions. So rows in shared memory are padded, which takes more
  // of it and less arithmetic; blocks that need no mask have a loop of their own; and what is loaded
  // meanwhile is asked for after the first product, not before.
  bool issue_bound = false;

  constexpr int rows_per_warp() const { return block_q / warps; }
  constexpr int smem_bytes(const FwdVariant& v) const {
    const int bytes = v.dtype == DType::f32 ? 6 : 2;  // as the tiles' kBytes
    const int cols = issue_bound ? v.head_dim + 8 : v.head_dim;
    return (block_q + 2 * stages * block_kv) * cols * bytes +
           (staged ? 8 * block_kv * v.head_dim : 0);
  }
};

// float32: the general tiles, and those of few rows, fit 99 KB of shared memory (AMD: 64 KB, but for
// head_dim 256) and take the place of the plain ones where those do not fit: sm_80 from head_dim 128.
constexpr FwdTile fwd_tile_f32(FwdVariant v, bool amd) {
  if (v.rows == FwdRows::few) {
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

// The tiles of 16 bits fit 88 KB of shared memory (AMD: 64 KB), but for the plain one of head_dim 256
// with many rows: it needs 128 KB, and where there is less the general one takes its place.
constexpr FwdTile fwd_tile(FwdVariant v, bool amd) {
  if (v.dtype == DType::f32) return fwd_tile_f32(v, amd);
  const bool few = v.rows == FwdRows::few, small = v.head_dim <= 128;
  if (amd) {  // never run there: chosen for no or few spilled registers, and two thread blocks in 64 KB
    const bool q_in_regs = v.head_dim <= (v.general ? 64 : 128);
    return {few ? 16 : 64, 32, few ? 1 : 4, 1, 1, q_in_regs};
  }
  if (few) return {16, 32, 1, 2, 6, small};
  if (v.general) {
    if (v.head_dim == 128) return {128, 32, 4, 2, 2, false, false, true};
    return {64, small ? 64 : 32, 4, 1, v.head_dim == 64 ? 3 : 2, small, false, small};
  }
  if (v.rows == FwdRows::some) return {64, 64, 4, 2, 2, true, false, true};
  switch (v.head_dim) {
    case 32: return {128, 64, 4, 2, 3, false};
    case 64: return {128, 64, 4, 2, 2, false, false, true};
    case 96: return {128, 64, 4, 2, 2, false};
    case 128: return {128, 32, 4, 2, 2, false, false, true};
    case 192: return {64, 64, 4, 1, 2, false};
    default: return {128, 64, 8, 1, 1, false};
  }
}

}  // namespace flash_ext
