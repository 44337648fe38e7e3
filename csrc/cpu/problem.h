// Addresses: from (head, query or key) of one sequence to memory.
#pragma once
#include "../attn/params.h"
#include "../attn/visible.h"
#include "kernels.h"

namespace flash_ext::cpu::FX_ISA {

template <typename T>
inline T* head_data(const TensorView& t, int64_t batch, int64_t head, int64_t start) {
  return static_cast<T*>(t.data) + batch * t.batch_stride + head * t.head_stride +
         start * t.seq_stride;
}

// A tensor's rows of one sequence and head: row i at data + i * stride.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* operator[](int64_t i) const { return data + i * stride; }
};

template <typename T>
inline Rows<T> q_rows(const TensorView& t, const Sequence& s, int64_t head) {
  return {head_data<T>(t, s.batch, head, s.q_start), t.seq_stride};
}
template <typename T>
inline Rows<T> kv_rows(const TensorView& t, const Sequence& s, int64_t head_kv) {
  return {head_data<T>(t, s.batch, head_kv, s.kv_start), t.seq_stride};
}

template <typename S>
inline S* lse_of(const AttnParams& p, const void* lse, const Sequence& s, int64_t head) {
  return static_cast<S*>(const_cast<void*>(lse)) + s.batch * p.lse_batch_stride +
         head * p.lse_head_stride + s.q_start;
}

struct Row {
  int64_t head, query;
};
inline Row row_at(const AttnParams& p, const Extent& t, int64_t r) {
  return {t.head_kv * (p.heads_q / p.heads_kv) + r / t.seq.seq_q, r % t.seq.seq_q};
}

// A few neighbouring rows and the keys that any of them sees.
struct RowBlock {
  int64_t begin;
  int count;
  KeyRange keys;
};

// The rows of an extent cut into blocks of at most kRows. A block stays within one head unless heads
// are short.
template <int kRows, typename Visit>
inline void for_each_block(const Extent& t, const BandMask& mask, Visit visit) {
  const int64_t seq_q = t.seq.seq_q;
  if (t.row_begin >= t.row_end) return;
  const int64_t together =
      std::max<int64_t>(kRows / seq_q, 1) * seq_q;  // rows of as many heads as fit
  for (int64_t r = t.row_begin; r < t.row_end;) {
    const int64_t query = r % seq_q;
    const int64_t end = std::min({r + kRows, r - query + together, t.row_end});
    const bool one_head = r / seq_q == (end - 1) / seq_q;
    const KeyRange keys =
        one_head ? mask.visible(query, query + end - r - 1) : mask.visible(0, seq_q - 1);
    visit(RowBlock{
        r, int(end - r), {std::max(keys.begin, t.kv_begin), std::min(keys.end, t.kv_end)}});
    r = end;
  }
}

}  // namespace flash_ext::cpu::FX_ISA
