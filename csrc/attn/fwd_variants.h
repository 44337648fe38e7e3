// Every forward kernel that is compiled, and the size of its tiles: all tuning is in this table.
#pragma once
#include "params.h"

namespace flash_ext {

inline constexpr int kFwdHeadDims[] = {32,  64,  96,
                                       128, 192, 256};  // others are filled up with zeros

// few, some: one tile holds all queries that share a KV head.
enum class FwdRows { few, some, many };

struct FwdVariant {
  DType dtype;
  int head_dim;  // one of kFwdHeadDims, not below that of q nor of v
  FwdRows rows;  // not `some` where general
  // Knows mask tensors, softcap, ALiBi, dropout, and rows that cannot be read 16 bytes at a time.
  // The others know what is left: causal, windows, sinks, packed sequences, any other strides.
  bool general;
  constexpr bool operator==(const FwdVariant&) const = default;
};

struct FwdTile {
  int block_q, block_kv, warps;
  int stages;         // blocks of keys in memory; 1: V is loaded during q k^T, the next K during p v
  int blocks_per_sm;  // that the registers must leave room for
  bool q_in_regs;     // else q is read from shared memory again for each block of keys
  // Warps that share rows. Each computes the scores of some keys and some columns of the output, so
  // that what is read from shared memory serves twice as many products.
  int parts = 1;

  constexpr int rows_per_warp() const { return block_q / warps * parts; }
  constexpr int smem_bytes(int head_dim) const {
    const int bytes = (block_q + 2 * stages * block_kv) * (head_dim + 8) * 2;
    return parts == 1 ? bytes : bytes + block_q * (block_kv + 8) * 2 + parts * block_q * 4;
  }
};

// The tiles fit 72 KB of shared memory (AMD: 64 KB), but for the plain one of head_dim 256 with many
// rows: it needs 101 KB, and where there is less the general one takes its place.
constexpr FwdTile fwd_tile(FwdVariant v, bool amd) {
  const bool few = v.rows == FwdRows::few, small = v.head_dim <= 128;
  if (amd)
    return {few ? 16 : 64, small ? 64 : v.head_dim <= 192 ? 32 : 16, few ? 1 : 4, 1, 1, small};
  if (few) return {16, 32, 1, 2, 5, small};
  if (v.general) return {64, small ? 64 : 32, 4, 1, 2, small};
  if (v.rows == FwdRows::some) return {64, 32, 4, 2, small ? 3 : 2, small};
  switch (v.head_dim) {
    case 32: return {128, 64, 4, 2, 3, false};
    case 64:
    case 96: return {128, 64, 4, 2, 2, false};
    case 128: return {128, 32, 4, 2, 2, false};
    case 192: return {64, 64, 4, 1, 2, false, 2};
    default: return {64, 64, 4, 1, 2, false, 2};
  }
}

}  // namespace flash_ext
