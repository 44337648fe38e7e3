// Rows of an accumulator to global memory.
#pragma once
#include "../tile/reg_tile.h"

namespace flash_ext::sm90 {

// Rounds a warp's 16 rows, which are those of dst from row0 on, and writes them as far as it has `rows` of
// them, and `cols` columns, a multiple of 8. Of each 16 columns a lane holds two neighbours, and two that
// are eight columns on; two lanes exchange theirs, so that each has four neighbours.
template <typename T, int kCols>
FX_DEVICE void write_rows(const AccTile<T, 16, kCols>& x, T* dst, int64_t stride, int row0,
                          int rows, int64_t cols) {
  const unsigned lane = lane_id();
  const bool odd = lane % 2;
  const int first_col = lane % 4 / 2 * 4 + (odd ? 8 : 0);
  dst += first_col;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = row0 + x.row(0, slot);
    T* to = dst + row * stride;
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      const auto rounded = MmaAtom<T>::to_operand(x.atom[0][n]);
      const uint32_t low = rounded.reg[slot], high = rounded.reg[slot + 2];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < rows && n * 16 + first_col < cols)
        *reinterpret_cast<uint2*>(to + n * 16) = odd ? uint2{got, high} : uint2{low, got};
    }
  }
}

}  // namespace flash_ext::sm90
