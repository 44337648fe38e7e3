// Query rows that read the same keys, and where they lie in tensors.
#pragma once
#include "../tile/platform.h"
#include "divisor.h"
#include "params.h"
#include "visible.h"

namespace flash_ext {

// The rows of one sequence and of `pack` neighbouring heads that share a KV head: row r is query
// r / pack of the (r % pack)-th of them.
struct RowGroup {
  int batch, head, kv_head;  // head: that of row 0
  Divisor pack;
  int rows;
  int seq_kv;
  int left, right;           // query i sees the keys from i - left to i + right
  int64_t first_q, first_k;  // where the sequence starts in packed tensors

  FX_DEVICE int query(int row) const { return pack.quotient(row); }
  FX_DEVICE int head_of(int row) const { return head + row - query(row) * pack.by; }

  // Element offsets in q or o: of row 0, and from there to a row.
  FX_DEVICE int64_t first_offset(const TensorView& t) const {
    return batch * t.batch_stride + head * t.head_stride + first_q * t.seq_stride;
  }
  FX_DEVICE int64_t from_first(const TensorView& t, int row) const {
    const int q = query(row);
    return q * t.seq_stride + (row - q * pack.by) * t.head_stride;
  }
  FX_DEVICE int64_t offset(const TensorView& t, int row) const {
    return first_offset(t) + from_first(t, row);
  }
  // Element offset of the KV head's first key.
  FX_DEVICE int64_t kv_offset(const TensorView& t) const {
    return batch * t.batch_stride + kv_head * t.head_stride + first_k * t.seq_stride;
  }
  FX_DEVICE int64_t lse_offset(const AttnParams& p, int row) const {
    return batch * p.lse_batch_stride + head_of(row) * p.lse_head_stride + first_q + query(row);
  }
};

// The index-th of batch * heads_q / pack groups.
FX_DEVICE RowGroup row_group(const AttnParams& p, unsigned index, Divisor pack) {
  const unsigned heads_q = static_cast<unsigned>(p.heads_q);
  const unsigned groups = heads_q / pack.by,
                 heads_of_kv = heads_q / static_cast<unsigned>(p.heads_kv);
  const int batch = index / groups, head = index % groups * pack.by;
  const int64_t first_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : 0;
  const int64_t first_k = p.cu_seqlens_k ? p.cu_seqlens_k[batch] : 0;
  const int64_t seq_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch + 1] - first_q : p.seq_q;
  const int64_t seq_kv = p.cu_seqlens_k ? p.cu_seqlens_k[batch + 1] - first_k : p.seq_kv;
  const BandMask band(p, seq_q, seq_kv);
  return {batch,
          head,
          static_cast<int>(head / heads_of_kv),
          pack,
          static_cast<int>(seq_q) * pack.by,
          static_cast<int>(seq_kv),
          static_cast<int>(band.left),
          static_cast<int>(band.right),
          first_q,
          first_k};
}

// Thread blocks are numbered so that groups whose tensors fit the L2 cache together (at_once of
// them) run together, and among those every group's first block comes before any second one.
struct BlockOfGroup {
  int block;
  unsigned group;
};
FX_DEVICE BlockOfGroup block_of_group(unsigned index, unsigned blocks, int64_t groups,
                                      unsigned at_once) {
  const unsigned first = index / (at_once * blocks) * at_once, rest = index % (at_once * blocks);
  const unsigned together = std::min(static_cast<unsigned>(groups) - first, at_once);
  return {static_cast<int>(rest / together), first + rest % together};
}

}  // namespace flash_ext
