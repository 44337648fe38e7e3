// What the backward kernels are told besides AttnBwdParams: how the work is cut. Made by bwd.cu.
#pragma once
#include "divisor.h"
#include "params.h"

namespace flash_ext {

// Of a query row: what its scores and their gradients are compared with.
struct RowStats {
  float lse;    // to base 2; +inf where the row sees no key, so that every weight becomes 0
  float delta;  // sum of grad_o * o, less the gradient of lse
};

// What BwdArgs::dq_paired changes in the places of a row of a panel, where it is wide enough.
constexpr int dq_flip(int panel_cols) { return panel_cols % 32 == 0 ? 16 : 0; }

struct BwdArgs {
  AttnBwdParams params;
  Divisor pack;        // heads whose rows are packed, see RowGroup: all that share a KV head, or 1
  int blocks_kv = 0;   // blocks of keys that the longest sequence fills
  int64_t groups = 0;  // batch * heads_kv
  int groups_at_once = 1;  // whose tensors stay in the L2 cache together
  // Of all query rows, in the order (packed heads or (batch, packed heads), query, head of those).
  int64_t rows = 0;
  RowStats* stats = nullptr;  // [rows]
  float* dq = nullptr;        // [rows, dq_cols]: sums without the factor scale
  int dq_cols = 0;            // the kernel's head_dim
  // Column c of row r of a sum lies at c ^ (r % 4 * dq_flip): 8 where sums go through shared
  // memory, where it keeps rows in different banks; else 0.
  int dq_flip = 0;
  // Hopper's order: panels of 64 columns, and the last of what is left, one behind the other. Of 16
  // columns of a row, 2t and 2t + 1 and those that are eight on lie together, at 4t; in odd rows
  // sixteens change places with their neighbours.
  bool dq_paired = false;
  static constexpr int kDqPanel = 64;

  // Where results must repeat bit for bit: [groups, blocks_q, turn_parts], how many blocks of keys have
  // added to a part of the dq of a block of rows; they do so in their order. Null: whenever they have
  // something.
  int* turns = nullptr;
  int blocks_q = 0;  // blocks of rows that the longest sequence fills
  int turn_parts = 1;

  // Index of the first row of a sequence's packed heads, the heads_of-th `pack` ones; first_q is where
  // the sequence starts in packed tensors.
  constexpr int64_t first_row(int64_t batch, int64_t heads_of, int64_t first_q) const {
    const AttnParams& p = params;
    if (p.cu_seqlens_q) return (heads_of * p.lse_head_stride + first_q) * pack.by;
    return (batch * (p.heads_q / pack.by) + heads_of) * p.seq_q * pack.by;
  }
};

}  // namespace flash_ext
