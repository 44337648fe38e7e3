// An operand in registers to a tile in shared memory.
#pragma once
#include "../tile/reg_tile.h"
#include "swizzled_tile.h"

namespace flash_ext::sm90 {

// Four 8x8 matrices of 16-bit values; lane i names row i % 8 of the (i / 8)-th.
FX_DEVICE void stmatrix(uint32_t address, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Writes a warp's 16 rows to those from row0 on.
template <typename T, int kRows, int kCols>
FX_DEVICE void store_operand(const OperandTile<T, 16, kCols>& x, SwizzledTile<T, kRows, kCols> dst,
                             int row0) {
  const unsigned lane = lane_id();
  const uint32_t first = ptx::shared_address(dst.at(row0 + lane % 16, lane / 16 * 8));
#pragma unroll
  for (int n = 0; n < kCols; n += 16)
    // The swizzle flips bits of the chunk, so that going on by whole chunks is flipping, too.
    stmatrix((first ^ n % kBlockCols * 2) + n / kBlockCols * dst.kBlockBytes,
             x.atom[0][n / 16].reg);
}

}  // namespace flash_ext::sm90
