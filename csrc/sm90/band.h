// Causal masks and windows on a warp's 16 rows of scores: what attn/band.h does, with a bit a score.
#pragma once
#include "../attn/fwd_task.h"
#include "../tile/reg_tile.h"

namespace flash_ext::sm90 {

// How many of the columns that this lane holds of a row are below `col`. In each atom they are two
// neighbours, and the two that are eight columns on.
template <int kCols>
FX_DEVICE int columns_below(int col) {
  const int from_first = std::clamp(col - AccTile<bf16_t, 16, 16>::first_col(), 0, kCols);
  const int in_atom = from_first % 16;
  return from_first / 16 * 4 + std::min(in_atom, 2) + std::clamp(in_atom - 8, 0, 2);
}

FX_DEVICE uint32_t lowest_bits(int count) { return count < 32 ? (1u << count) - 1 : ~0u; }

// Hides the keys that a row does not see; row r is query r. Bits, not columns, because the compiler moves seven of them
// at once into predicates.
template <typename T, int kCols>
FX_DEVICE void hide_unseen(AccTile<T, 16, kCols>& s, const FwdTask& task, int row0, int kv0) {
  static_assert(kCols <= 128, "a bit for each of a lane's columns");
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int query = row0 + s.row(0, slot) - kv0;
    const int end = std::min(query + task.right + 1, task.seq_kv - kv0);
    const uint32_t seen = lowest_bits(columns_below<kCols>(end)) &
                          ~lowest_bits(columns_below<kCols>(query - task.left));
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s.atom[0][n].reg[i % 2 + 2 * slot + i / 2 * 4];
        x = seen & 1u << (4 * n + i) ? x : -INFINITY;
      }
  }
}

}  // namespace flash_ext::sm90
