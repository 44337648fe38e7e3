// The copy engine (TMA): boxes of a tensor to shared memory.
#pragma once
#include <cuda.h>

#include "mbarrier.h"
#include "swizzled_tile.h"

namespace flash_ext::sm90 {

// Where a box starts in a tensor [batch, head, row, col].
struct Corner {
  int row, head, batch;
};

FX_DEVICE void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts to copy a tile. One thread calls it; `full` hears of the bytes. What lies outside of the
// tensor becomes zero.
template <typename T, int kRows, int kCols>
FX_DEVICE void copy_tile(SwizzledTile<T, kRows, kCols> dst, const CUtensorMap& map, Corner from,
                         Mbarrier& full) {
  using Tile = SwizzledTile<T, kRows, kCols>;
  full.arrive_and_expect(Tile::kBytes);
#pragma unroll
  for (int i = 0; i < Tile::kBlocks; ++i)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(ptx::shared_address(dst.block(i))),
        "l"(&map), "r"(i * kBlockCols), "r"(from.row), "r"(from.head), "r"(from.batch),
        "r"(ptx::shared_address(&full.state))
        : "memory");
}

}  // namespace flash_ext::sm90
