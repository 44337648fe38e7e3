// What a bool mask leaves to see, found before attention starts, so that blocks of keys which it hides
// from all queries of a tile are passed over: padding, and causal masks that come as tensors.
#pragma once
#include <cstdint>

namespace flash_ext {

inline constexpr int kSeenQueries = 64;  // that have a range of keys in common

struct SeenRange {
  int begin, end;
};

struct SeenKeys {
  const SeenRange* ranges =
      nullptr;  // [batches, heads, blocks of kSeenQueries], sizes as the mask's
  int64_t batch_stride = 0, head_stride = 0;
  int batches = 0, heads = 0, blocks = 0;  // blocks: 1 where the mask is the same for all queries

  int64_t count() const { return int64_t{batches} * heads * blocks; }
};

}  // namespace flash_ext
