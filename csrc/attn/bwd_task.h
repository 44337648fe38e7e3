// What one thread block of the backward kernel computes.
#pragma once
#include "bwd_args.h"
#include "row_group.h"

namespace flash_ext {

struct BwdTask : RowGroup {
  int64_t first_row;           // of the group, in BwdArgs::stats and dq
  unsigned group;              // its index
  int key0;                    // the first key of the block
  int block_begin, block_end;  // blocks of query rows that see a key of it
  int whole_begin, whole_end;  // those among them of which every row sees all of its keys
};

// The rows that meet the key_block-th block of keys of a group.
template <int kBlockKV, int kBlockQ>
FX_DEVICE BwdTask bwd_task(const BwdArgs& args, unsigned group, int key_block) {
  const RowGroup rows = row_group(args.params, group, args.pack);
  const int64_t first_row = args.first_row(rows.batch, rows.pack.quotient(rows.head), rows.first_q);
  const int key0 = key_block * kBlockKV;
  BwdTask t{rows, first_row, group, key0, 0, 0, 0, 0};
  if (key0 >= t.seq_kv) return t;
  const int queries = t.rows / t.pack.by, last_key = std::min(key0 + kBlockKV, t.seq_kv) - 1;
  const int any_begin = std::clamp(key0 - t.right, 0, queries) * t.pack.by;
  const int any_end = std::clamp(last_key + t.left + 1, 0, queries) * t.pack.by;
  if (any_begin >= any_end) return t;
  t.block_begin = any_begin / kBlockQ;
  t.block_end = (any_end + kBlockQ - 1) / kBlockQ;
  if (key0 + kBlockKV > t.seq_kv) return t;
  const int every_begin = std::clamp(last_key - t.right, 0, queries) * t.pack.by;
  const int every_end = std::clamp(key0 + t.left + 1, 0, queries) * t.pack.by;
  // Rows beyond the last one do no harm.
  t.whole_begin = (every_begin + kBlockQ - 1) / kBlockQ;
  t.whole_end = every_end == t.rows ? t.block_end : every_end / kBlockQ;
  return t;
}

}  // namespace flash_ext
