// Rows of an accumulator to global memory.
#pragma once
#include "../tile/reg_tile.h"
#include "swizzled_tile.h"

namespace flash_ext::sm90 {

// Rounds a warp's 16 rows and writes the first `rows` of them, and of their columns `cols`, to dst. They
// pass through those rows of a tile from `first` on, which nobody else uses.
template <typename T, int kCols, typename Tile>
FX_DEVICE void write_rows(const AccTile<T, 16, kCols>& x, Tile tile, int first, T* dst,
                          int64_t stride, int rows, int cols) {
  constexpr int kChunks = kCols / 8;
  x.store(tile, first);
  __syncwarp();  // the 16 rows are there
#pragma unroll 4
  for (int i = lane_id(); i < 16 * kChunks; i += kWarpSize) {
    const int row = i / kChunks, col = i % kChunks * 8;
    if (row < rows && col < cols)
      *reinterpret_cast<uint4*>(dst + row * stride + col) =
          *reinterpret_cast<const uint4*>(tile.at(first + row, col));
  }
}

}  // namespace flash_ext::sm90
