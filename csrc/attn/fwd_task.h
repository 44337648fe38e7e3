// What one thread block of the forward kernel computes.
#pragma once
#include "fwd_args.h"
#include "row_group.h"

namespace flash_ext {

struct FwdTask : RowGroup {
  int row0;  // the tile's first row
  int split;
  int block_begin, block_end;  // blocks of keys
  int whole_begin, whole_end;  // those among them that every row sees all of
};

// The number-th of args.heads * args.blocks_q * args.splits. Among the tiles that run together, those
// with the most work come first.
template <int kBlockQ, int kBlockKV>
FX_DEVICE FwdTask fwd_task(const FwdArgs& args, unsigned number) {
  const unsigned index = number / args.splits, split = number % args.splits;
  const auto [block, group] = block_of_group(index, args.blocks_q, args.heads, args.heads_at_once);
  const int row0 = (args.longest_last ? args.blocks_q - 1 - block : block) * kBlockQ;
  FwdTask t{row_group(args.params, group, args.pack), row0, static_cast<int>(split), 0, 0, 0, 0};
  if (row0 >= t.rows) return t;

  const int first = t.query(row0), last = t.query(std::min(row0 + kBlockQ, t.rows) - 1);
  const int any_begin = std::max(first - t.left, 0);
  const int any_end = std::min(last + t.right + 1, t.seq_kv);
  if (any_begin >= any_end) return t;
  const int every_begin = std::max(last - t.left, 0);
  const int every_end = std::clamp(first + t.right + 1, 0, t.seq_kv);
  const int begin = any_begin / kBlockKV, end = (any_end + kBlockKV - 1) / kBlockKV;
  const int share = (end - begin + args.splits - 1) / args.splits;
  t.block_begin = begin + static_cast<int>(split) * share;
  t.block_end = std::min(t.block_begin + share, end);
  t.whole_begin = (every_begin + kBlockKV - 1) / kBlockKV;
  t.whole_end = every_end / kBlockKV;
  return t;
}

}  // namespace flash_ext
