// Sums of dq in global memory, to which registers are added.
#pragma once
#include "../tile/reg_tile.h"
#include "warpgroup.h"

namespace flash_ext::sm90 {

// dst[i] += of four neighbours, each indivisible; dst is aligned to 16 bytes.
FX_DEVICE void red_add(float* dst, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Adds a warp's 16 rows, or the first `rows` of them, to sums whose rows are kStride apart, in the order
// of BwdArgs::dq_paired: so a lane's four columns of a row and an atom are neighbours. dst: where the
// first row and column lie. Columns from `cols` on are left out.
template <int kStride, typename T, int kCols>
FX_DEVICE void add_to_sums(float* dst, const AccTile<T, 16, kCols>& x, int rows, int cols) {
  dst += x.row(0, 0) * kStride + static_cast<int>(lane_id() % 4) * 4;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    if (x.row(0, slot) >= rows) continue;
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      const float* y = x.atom[0][n].reg + 2 * slot;
      if (16 * n < cols) red_add(dst + slot * 8 * kStride + 16 * n, y[0], y[1], y[4], y[5]);
    }
  }
}

}  // namespace flash_ext::sm90
