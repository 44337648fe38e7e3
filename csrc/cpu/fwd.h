// Forward: blocks of keys outside, blocks of rows inside, online softmax between two products.
// FlashAttention-2 (Dao, 2023) with the loops exchanged, so that each block of K and V is packed once
// for all rows of a task.
#pragma once
#include "gemm.h"
#include "math.h"
#include "pack.h"
#include "scores.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kBlockRows =
    24;  // a multiple of kMaxRows, as little as possible beyond a diagonal
template <typename Math>
inline constexpr int kBlockKeys = 512;  // a packed block of K and of V fits the second cache

// Ends a row: divides by the softmax's denominator, or leaves the pieces for fwd_combine.
template <typename T, typename S>
inline void finish_row(const AttnParams& p, const FwdTask& t, const FwdParts& parts, int64_t r,
                       SoftmaxState<S> state, const S* acc) {
  using V = Vec<S>;
  constexpr S kInf = std::numeric_limits<S>::infinity();
  const int head_dim_v = int(p.head_dim_v);
  if (t.part >= 0) {
    const int64_t at = t.part * parts.rows + r - t.row_begin;
    S* out = static_cast<S*>(parts.out) + at * head_dim_v;
    S* stats = static_cast<S*>(parts.stats) + at * 2;
    for (int j = 0; j < head_dim_v; j += V::kLanes)
      (state.sum == 0 ? V::zero() : V::load(acc + j)).store(out + j, head_dim_v - j);
    stats[0] = state.top;
    stats[1] = state.sum;
    return;
  }
  const Row row = row_at(p, t, r);
  S factor = 1;
  if (p.sinks) {  // a logit that enters the denominator alone
    const S sink = static_cast<const S*>(p.sinks)[row.head];
    const S top = sink > state.top ? sink : state.top;
    if (top != -kInf) {
      factor = state.top == -kInf ? S(0) : std::exp(state.top - top);
      state.sum = state.sum * factor + std::exp(sink - top);
      state.top = top;
    }
    if (sink != sink) state.sum = sink;
  }
  const bool empty = state.sum == 0 || (factor == 0 && state.sum == state.sum);
  T* out = q_rows<T>(p.o, t.seq, row.head)[row.query];
  const V inverse = V::all(factor / state.sum);
  for (int j = 0; j < head_dim_v; j += V::kLanes)
    (empty ? V::zero() : V::load(acc + j) * inverse).store(out + j, head_dim_v - j);
  if (p.lse)
    lse_of<S>(p, p.lse, t.seq, row.head)[row.query] =
        state.sum == 0 ? -kInf : state.top + std::log(state.sum);
}

template <typename T, typename Math>
void fwd(const AttnParams& p, const FwdTask& t, const FwdParts& parts, Scratch& scratch) {
  using S = typename Math::Acc;
  using Word = typename Math::Word;
  using V = Vec<S>;
  constexpr int kKeys = kBlockKeys<Math>;
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v);
  const int64_t q_ld = round_up(words<Math>(head_dim), kLanes<Math>),
                acc_ld = round_up(head_dim_v, kLanes<Math>);
  constexpr int kScoreStride = kKeys + kLanes<Math>;  // no power of two apart
  const BandMask mask(p, t.seq.seq_q, t.seq.seq_kv);
  const int64_t rows = t.row_end - t.row_begin;

  Word* q_pack = scratch.take<Word>(kBlockRows * q_ld);
  Word* k_pack = scratch.take<Word>(round_up(kKeys, kPanel<Math>) * words<Math>(head_dim));
  Word* v_pack = scratch.take<Word>(round_up(head_dim_v, kPanel<Math>) * words<Math>(kKeys));
  S* s = scratch.take<S>(kBlockRows * kScoreStride);
  Word* probs = std::is_same_v<Word, S> ? reinterpret_cast<Word*>(s)
                                        : scratch.take<Word>(kBlockRows * kScoreStride / 2);
  constexpr int kProbStride = kScoreStride / Math::kWordElements;
  S* acc = scratch.take<S>(rows * acc_ld);
  auto* state = scratch.take<SoftmaxState<S>>(rows);
  std::fill_n(state, rows, SoftmaxState<S>{});
  std::fill_n(acc, rows * acc_ld, S(0));
  Scores<S> scores(p, t.seq, kKeys, scratch);

  const Rows<const T> k = kv_rows<const T>(p.k, t.seq, t.head_kv),
                      v = kv_rows<const T>(p.v, t.seq, t.head_kv);
  const auto finish = [&](const RowBlock& block) {
    for (int64_t r = block.begin; r < block.begin + block.count; ++r)
      finish_row<T>(p, t, parts, r, state[r - t.row_begin], acc + (r - t.row_begin) * acc_ld);
  };
  KeyRange all{t.kv_end, t.kv_begin};  // keys that any row sees
  for_each_block<kBlockRows>(t, mask, [&](const RowBlock& block) {
    if (block.keys.begin >= block.keys.end) return finish(block);
    all.begin = std::min(all.begin, block.keys.begin);
    all.end = std::max(all.end, block.keys.end);
  });

  for (int64_t kv0 = all.begin; kv0 < all.end; kv0 += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, all.end - kv0));
    pack_panels_transposed<Math>([&](int64_t n) { return k[kv0 + n]; }, keys, head_dim, k_pack);
    pack_panels<Math>([&](int64_t n) { return v[kv0 + n]; }, keys, head_dim_v, v_pack);

    for_each_block<kBlockRows>(t, mask, [&](const RowBlock& block) {
      const int seen_begin = int(std::max<int64_t>(block.keys.begin - kv0, 0));
      const int seen_end = int(std::min<int64_t>(block.keys.end - kv0, keys));
      if (seen_begin >= seen_end) return;
      const bool last = kv0 + keys >= block.keys.end;
      constexpr int kWordVector = kLanes<Math> * Math::kWordElements;
      const int out_begin = seen_begin / kWordVector * kWordVector;
      const int out_end = int(round_up(seen_end, kWordVector));

      for (int i = 0; i < block.count; ++i) {
        const Row row = row_at(p, t, block.begin + i);
        pack_row<Math>(q_rows<const T>(p.q, t.seq, row.head)[row.query], head_dim,
                       q_pack + i * q_ld);
        if (block.begin + block.count + i < t.row_end) {
          const Row next = row_at(p, t, block.begin + block.count + i);
          prefetch(q_rows<const T>(p.q, t.seq, next.head)[next.query], head_dim);
        }
        if (last && t.part < 0)
          prefetch_for_write(q_rows<const T>(p.o, t.seq, row.head)[row.query], head_dim_v);
      }
      // s = q kᵀ
      for (int j = seen_begin / kPanel<Math> * kPanel<Math>; j < seen_end; j += kPanel<Math>)
        multiply_panel<Math>(block.count, std::min(seen_end - j, kPanel<Math>),
                             words<Math>(head_dim), q_pack, q_ld,
                             k_pack + j * words<Math>(head_dim), s + j, kScoreStride, false);

      const int64_t first = block.begin - t.row_begin;
      for (int i = 0; i < block.count; ++i) {
        const Row row = row_at(p, t, block.begin + i);
        const KeyRange visible = mask.visible(row.query);
        const int begin = int(std::clamp<int64_t>(visible.begin - kv0, seen_begin, seen_end));
        const int end = int(std::clamp<int64_t>(visible.end - kv0, seen_begin, seen_end));
        S* s_row = s + i * kScoreStride;
        Word* probs_row = probs + i * kProbStride;
        const S* keep = scores.has_dropout() ? scores.keep(row, kv0, begin, end) : nullptr;
        S rescale;
        if (scores.general()) {
          scores.apply(row, kv0, begin, end, s_row);
          rescale = softmax_step<Math, true>(state[first + i], s_row, begin, end, S(1), keep,
                                             probs_row, out_begin, out_end);
        } else {
          rescale = softmax_step<Math, false>(state[first + i], s_row, begin, end, S(p.scale), keep,
                                              probs_row, out_begin, out_end);
        }
        if (rescale != 1) {
          S* a = acc + (first + i) * acc_ld;
          for (int64_t j = 0; j < acc_ld; j += V::kLanes)
            (V::load(a + j) * V::all(rescale)).store(a + j);
        }
      }
      // acc += probs v
      const int64_t k0 = out_begin / Math::kWordElements;
      const int64_t depth = words<Math>(std::min(out_end, keys)) - k0;
      multiply<Math>(block.count, head_dim_v, depth, probs + k0, kProbStride,
                     v_pack + k0 * kPanel<Math>, words<Math>(keys), acc + first * acc_ld, acc_ld,
                     true);
      if (last) finish(block);
    });
  }
}

// Adds up the parts of rows whose keys were split over several tasks.
template <typename T, typename Math>
void fwd_combine(const AttnParams& p, const FwdTask& t, int64_t part_count, const FwdParts& parts,
                 Scratch& scratch) {
  using S = typename Math::Acc;
  using V = Vec<S>;
  const int64_t acc_ld = round_up(p.head_dim_v, kLanes<Math>);
  S* acc = scratch.take<S>(acc_ld);
  for (int64_t r = t.row_begin; r < t.row_end; ++r) {
    SoftmaxState<S> state;
    std::fill_n(acc, acc_ld, S(0));
    for (int64_t part = 0; part < part_count; ++part) {
      const int64_t at = (t.part + part) * parts.rows + r - t.row_begin;
      const S* out = static_cast<const S*>(parts.out) + at * p.head_dim_v;
      const S* stats = static_cast<const S*>(parts.stats) + at * 2;
      if (stats[1] == 0) continue;
      const S top = std::max(state.top, stats[0]);
      const bool known = top != -std::numeric_limits<S>::infinity();  // else all NaN
      const S old_scale = known ? std::exp(state.top - top) : S(1),
              new_scale = known ? std::exp(stats[0] - top) : S(1);
      for (int64_t j = 0; j < p.head_dim_v; j += V::kLanes) {
        const int n = int(std::min<int64_t>(p.head_dim_v - j, V::kLanes));
        fma(V::load(out + j, n), V::all(new_scale), V::load(acc + j) * V::all(old_scale))
            .store(acc + j);
      }
      state.sum = state.sum * old_scale + stats[1] * new_scale;
      state.top = top;
    }
    FwdTask whole = t;
    whole.part = -1;
    finish_row<T>(p, whole, parts, r, state, acc);
  }
}

}  // namespace flash_ext::cpu::FX_ISA
