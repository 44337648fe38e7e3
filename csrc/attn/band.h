// Causal masks and windows on a tile of scores.
#pragma once
#include "../tile/reg_tile.h"
#include "fwd_task.h"

namespace flash_ext {

// Hides the keys that a row does not see.
template <typename T, int kRows, int kCols>
FX_DEVICE void apply_band(AccTile<T, kRows, kCols>& s, const FwdTask& task, int row0, int kv0) {
  RowVec<T, kRows, int> begin, end;
  begin.for_each([&](int& x, int m, int r) {
    const int query = task.query(row0 + s.row(m, r)) - kv0;
    x = query - task.left;
    end.v[m][r] = std::min(query + task.right + 1, task.seq_kv - kv0);
  });
  s.for_each([&](float& x, int m, int r, int col) {
    if (col < begin.v[m][r] || col >= end.v[m][r]) x = -INFINITY;
  });
}

}  // namespace flash_ext
