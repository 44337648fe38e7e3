// The functions that each instruction set provides, and the plain structs between them and the
// launcher. One table a target and type: targets/ fills them, dispatch.cpp picks.
#pragma once
#include <cstddef>
#include <cstdint>

#include "../attn/params.h"
#include "scratch.h"

namespace flash_ext::cpu {

// One sequence of the batch. Packed tensors: where it starts; dense: 0.
struct Sequence {
  int64_t batch, q_start, kv_start, seq_q, seq_kv;
};

// Some rows of one KV head against some of its keys. The rows of a KV head are those of its query
// heads one after the other: row r is query r % seq_q of the group's head r / seq_q.
struct Extent {
  Sequence seq;
  int64_t head_kv;
  int64_t row_begin, row_end;
  int64_t kv_begin, kv_end;
};

struct FwdTask : Extent {
  int64_t
      part;  // -1: all visible keys are in kv_begin to kv_end; else where the partial result goes
};

// What tasks with part >= 0 leave, in the acc dtype: [parts, rows, head_dim_v] and [parts, rows, 2],
// counting rows from the task's first.
struct FwdParts {
  void* out = nullptr;    // sum of exp(s - top) v
  void* stats = nullptr;  // top = max s, and the sum of exp(s - top)
  int64_t rows = 0;
};

struct BwdTask : Extent {
  bool want_dq;   // needs all keys in kv_begin to kv_end
  bool want_dkv;  // needs all rows in row_begin to row_end
};

// All that is added into one block of dmask: queries q_begin to q_end and keys kv_begin to kv_end of
// every batch and head that read the same mask elements.
struct MaskGradTask {
  int64_t batch_begin, batch_end, head_begin, head_end;
  int64_t q_begin, q_end, kv_begin, kv_end;
};

struct Kernels {
  int64_t few_rows;  // at most so many rows for fwd_few_rows
  int64_t fwd_rows;  // block sizes, of which tasks are best multiples
  int64_t bwd_rows, bwd_keys;
  void (*fwd)(const AttnParams&, const FwdTask&, const FwdParts&, Scratch&);
  void (*fwd_few_rows)(const AttnParams&, const FwdTask&, const FwdParts&, Scratch&);
  void (*fwd_combine)(const AttnParams&, const FwdTask&, int64_t parts, const FwdParts&, Scratch&);
  void (*bwd)(const AttnBwdParams&, const BwdTask&, Scratch&);
  void (*bwd_mask)(const AttnBwdParams&, const Sequence*, const MaskGradTask&, Scratch&);
  void (*bwd_sink)(const AttnBwdParams&, const Sequence*, int64_t head);
};

}  // namespace flash_ext::cpu
