// What one thread block of the forward kernel computes.
#pragma once
#include "../tile/platform.h"
#include "fwd_args.h"
#include "visible.h"

namespace flash_ext {

struct FwdTask {
  int batch, head, kv_head;  // head: that of row 0
  int row0, rows;            // the tile's first row; all rows, see FwdArgs::pack
  int pack;
  int64_t first_q, first_k;  // where the sequence starts in packed tensors
  int left, right;           // query i sees the keys from i - left to i + right
  int seq_kv;
  int split;
  int block_begin, block_end;  // blocks of keys
  int whole_begin, whole_end;  // those among them that every row sees all of

  FX_DEVICE int query(int row) const { return pack == 1 ? row : row / pack; }
  FX_DEVICE int head_of(int row) const { return pack == 1 ? head : head + row % pack; }

  // Element offset of a row of q or o.
  FX_DEVICE int64_t offset(const TensorView& t, int row) const {
    const int64_t first = batch * t.batch_stride + head * t.head_stride + first_q * t.seq_stride;
    if (pack == 1) return first + row * t.seq_stride;
    return first + row % pack * t.head_stride + row / pack * t.seq_stride;
  }
  // Element offset of the KV head's first key.
  FX_DEVICE int64_t kv_offset(const TensorView& t) const {
    return batch * t.batch_stride + kv_head * t.head_stride + first_k * t.seq_stride;
  }
  FX_DEVICE int64_t lse_offset(const AttnParams& p, int row) const {
    return batch * p.lse_batch_stride + head_of(row) * p.lse_head_stride + first_q + query(row);
  }
};

// Blocks are numbered so that heads whose K and V fit the L2 cache run together, and among those
// the tiles with the most work first.
template <int kBlockQ, int kBlockKV>
FX_DEVICE FwdTask fwd_task(const FwdArgs& args) {
  const AttnParams& p = args.params;
  const unsigned index = blockIdx.x / args.splits, split = blockIdx.x % args.splits;
  const unsigned group_size = args.heads_at_once * args.blocks_q;
  const unsigned group_head = index / group_size * args.heads_at_once;
  const unsigned in_group = index % group_size;
  const unsigned heads = std::min<unsigned>(args.heads - group_head, args.heads_at_once);
  const int block_q = in_group / heads;
  const unsigned batch_head = group_head + in_group % heads;

  const unsigned heads_per_batch = static_cast<unsigned>(p.heads_q) / args.pack;
  const int batch = batch_head / heads_per_batch;
  const int head = batch_head % heads_per_batch * args.pack;
  const int64_t first_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : 0;
  const int64_t first_k = p.cu_seqlens_k ? p.cu_seqlens_k[batch] : 0;
  const int64_t seq_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch + 1] - first_q : p.seq_q;
  const int64_t seq_kv = p.cu_seqlens_k ? p.cu_seqlens_k[batch + 1] - first_k : p.seq_kv;
  const int row0 = (args.longest_last ? args.blocks_q - 1 - block_q : block_q) * kBlockQ;

  const BandMask band(p, seq_q, seq_kv);
  FwdTask t{
      batch,
      head,
      head / static_cast<int>(static_cast<unsigned>(p.heads_q) / static_cast<unsigned>(p.heads_kv)),
      row0,
      static_cast<int>(seq_q) * args.pack,
      args.pack,
      first_q,
      first_k,
      static_cast<int>(band.left),
      static_cast<int>(band.right),
      static_cast<int>(seq_kv),
      static_cast<int>(split),
      0,
      0,
      0,
      0};
  const int first = t.query(row0), last = t.query(std::min(row0 + kBlockQ, t.rows) - 1);
  const KeyRange any = band.visible(first, last);
  if (row0 >= t.rows || any.begin >= any.end) return t;
  const KeyRange every{band.visible(last).begin, std::max(band.visible(first).end, int64_t{0})};
  const int begin = static_cast<int>(any.begin) / kBlockKV;
  const int end = (static_cast<int>(any.end) + kBlockKV - 1) / kBlockKV;
  const int share = (end - begin + args.splits - 1) / args.splits;
  t.block_begin = begin + split * share;
  t.block_end = std::min(t.block_begin + share, end);
  t.whole_begin = static_cast<int>((every.begin + kBlockKV - 1) / kBlockKV);
  t.whole_end = static_cast<int>(every.end / kBlockKV);
  return t;
}

}  // namespace flash_ext
