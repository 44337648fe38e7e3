// A tile in shared memory as the copy engine writes and wgmma reads it: blocks of 64 columns, one
// behind the other, whose rows of 128 bytes have their 16-byte chunks permuted.
#pragma once
#include "../tile/platform.h"

namespace flash_ext::sm90 {

inline constexpr int kBlockCols = 64;  // 128 bytes

template <typename T, int kRows, int kCols>
struct SwizzledTile {
  static_assert(sizeof(T) == 2 && kRows % 8 == 0);
  static constexpr int kBlocks = (kCols + kBlockCols - 1) / kBlockCols;
  static constexpr int kBlockBytes = kRows * kBlockCols * 2, kBytes = kBlocks * kBlockBytes;
  T* data;  // aligned to 1024 bytes

  FX_DEVICE T* block(int i) const { return data + i * kRows * kBlockCols; }
  FX_DEVICE static unsigned offset(unsigned row, unsigned col) {
    return col / kBlockCols * (kRows * kBlockCols) + row * kBlockCols +
           (col % kBlockCols ^ row % 8 * 8);
  }
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    return offset(row0 + row, col0 + col);
  }
  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + offset(row, col); }

  // What wgmma is told: where the operand starts, what lies `across` (from a block to the next, read
  // only where columns are the product's n) and `down` (from eight rows to the next), in 16 bytes.
  FX_DEVICE uint64_t descriptor() const {
    constexpr uint64_t kSwizzle128 = 1, kDown = 1024 / 16, kAcross = kBlockBytes / 16;
    return ptx::shared_address(data) / 16 | kAcross << 16 | kDown << 32 | kSwizzle128 << 62;
  }
  // The same from another row (a multiple of 8) or column on (of 16; of 64 where columns are n).
  FX_DEVICE static constexpr uint64_t step(int row, int col) {
    return (col / kBlockCols * kBlockBytes + row * 128 + col % kBlockCols * 2) / 16;
  }
};

}  // namespace flash_ext::sm90
