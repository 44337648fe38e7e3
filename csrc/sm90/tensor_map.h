// What the copy engine is told of a tensor.
#pragma once
#include <cuda.h>

#include "../attn/params.h"

namespace flash_ext::sm90 {

// A tensor [batch, heads, rows, cols] of 16-bit elements that is copied in boxes of 64 columns and
// box_rows rows.
struct Extent {
  int64_t batch, heads, rows, cols;
  bool operator==(const Extent&) const = default;
};
// The copy engine's condition: addresses in 16 bytes, and no dimension that stands still.
bool can_be_copied(const TensorView& tensor, Extent extent);
CUtensorMap tensor_map(const TensorView& tensor, Extent extent, int box_rows);

}  // namespace flash_ext::sm90
