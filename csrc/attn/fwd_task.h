// What one thread block of the forward kernel computes.
#pragma once
#include "fwd_args.h"
#include "row_group.h"

namespace flash_ext {

// Blocks of keys for some rows.
struct KeyBlocks {
  int block_begin = 0, block_end = 0;  // of which some row sees a part
  int whole_begin = 0, whole_end = 0;  // those among them that every row sees all of
};

// From the first to the last key that a mask leaves to some of these queries.
FX_DEVICE SeenRange seen_by(const SeenKeys& seen, const RowGroup& group, int first, int last) {
  const SeenRange* ranges =
      seen.ranges + group.batch * seen.batch_stride + group.head * seen.head_stride;
  SeenRange all{INT32_MAX, 0};
  for (int i = first / kSeenQueries; i <= last / kSeenQueries; ++i) {
    const SeenRange range = ranges[std::min(i, seen.blocks - 1)];
    all = {std::min(all.begin, range.begin), std::max(all.end, range.end)};
  }
  return all;
}

// Those for the rows from row0 to row_end, which exist. kMasked: seen may have ranges.
template <int kBlockKV, bool kMasked>
FX_DEVICE KeyBlocks key_blocks(const RowGroup& group, int row0, int row_end, const SeenKeys& seen) {
  const int first = group.query(row0), last = group.query(row_end - 1);
  int any_begin = std::max(first - group.left, 0);
  int any_end = std::min(last + group.right + 1, group.seq_kv);
  if constexpr (kMasked)
    if (seen.ranges) {
      const SeenRange range = seen_by(seen, group, first, last);
      any_begin = std::max(any_begin, range.begin), any_end = std::min(any_end, range.end);
    }
  if (any_begin >= any_end) return {};
  const int every_begin = std::max(last - group.left, 0);
  const int every_end = std::clamp(first + group.right + 1, 0, group.seq_kv);
  return {any_begin / kBlockKV, (any_end + kBlockKV - 1) / kBlockKV,
          (every_begin + kBlockKV - 1) / kBlockKV, every_end / kBlockKV};
}

struct FwdTask : RowGroup, KeyBlocks {
  int row0;  // the tile's first row
  int split;
};

// The number-th of args.heads * args.blocks_q * args.splits. Among the tiles that run together, those
// with the most work come first.
template <int kBlockQ, int kBlockKV, bool kMasked>
FX_DEVICE FwdTask fwd_task(const FwdArgs& args, unsigned number) {
  const unsigned index = number / args.splits, split = number % args.splits;
  const auto [block, group] = block_of_group(index, args.blocks_q, args.heads, args.heads_at_once);
  const int row0 = (args.longest_last ? args.blocks_q - 1 - block : block) * kBlockQ;
  FwdTask t{row_group(args.params, group, args.pack), {}, row0, static_cast<int>(split)};
  if (row0 >= t.rows) return t;

  const KeyBlocks all =
      key_blocks<kBlockKV, kMasked>(t, row0, std::min(row0 + kBlockQ, t.rows), args.seen);
  const int share = (all.block_end - all.block_begin + args.splits - 1) / args.splits;
  static_cast<KeyBlocks&>(t) = all;
  t.block_begin += static_cast<int>(split) * share;
  t.block_end = std::min(t.block_begin + share, all.block_end);
  return t;
}

}  // namespace flash_ext
