// Backward: the five products of FlashAttention-2 (Dao, 2023), blocks of keys outside and blocks of rows
// inside. dK and dV of a block stay in cache, dQ of all rows of the task is summed in the acc dtype.
#pragma once
#include "fwd.h"

namespace flash_ext::cpu::FX_ISA {

// rowsum(do · o), less the gradient that reaches the row's lse.
template <typename T, typename S>
inline S delta_of(const AttnBwdParams& p, const Sequence& seq, Row row) {
  using V = Vec<S>;
  const int head_dim_v = int(p.head_dim_v);
  const T* o = q_rows<const T>(p.o, seq, row.head)[row.query];
  const T* grad = q_rows<const T>(p.grad_o, seq, row.head)[row.query];
  V sum = V::zero();
  int j = 0;
  for (; j + V::kLanes <= head_dim_v; j += V::kLanes)
    sum = fma(V::load(o + j), V::load(grad + j), sum);
  if (j < head_dim_v)
    sum = fma(V::load(o + j, head_dim_v - j), V::load(grad + j, head_dim_v - j), sum);
  const S dlse = p.grad_lse ? lse_of<S>(p, p.grad_lse, seq, row.head)[row.query] : S(0);
  return reduce_add(sum) - dlse;
}

// One block of rows against one block of keys: probabilities and score gradients.
template <typename T, typename Math>
class BwdTile {
 public:
  using S = typename Math::Acc;
  using Word = typename Math::Word;
  using V = Vec<S>;
  static constexpr int kRows = 96, kKeys = 192;
  static constexpr int kStride = kKeys + kLanes<Math>;  // of p and ds; no power of two
  static constexpr int kStep = kLanes<Math> * Math::kWordElements;

  // [row][key]; 0 for keys that the row does not see, from out_begin to out_end.
  S *p, *ds;
  int seen_begin, seen_end, out_begin, out_end;

  BwdTile(const AttnBwdParams& params, const Extent& extent, Scratch& scratch)
      : params_(params), extent_(extent), mask_(params, extent.seq.seq_q, extent.seq.seq_kv),
        scores_(params, extent.seq, kKeys, scratch), head_dim_(int(params.head_dim)),
        head_dim_v_(int(params.head_dim_v)), q_ld_(round_up(words<Math>(head_dim_), kLanes<Math>)),
        do_ld_(round_up(words<Math>(head_dim_v_), kLanes<Math>)) {
    p = scratch.take<S>(kRows * kStride);
    ds = scratch.take<S>(kRows * kStride);
    q_ = scratch.take<Word>(kRows * q_ld_);
    do_ = scratch.take<Word>(kRows * do_ld_);
    k_transposed_ = scratch.take<Word>(round_up(kKeys, kPanel<Math>) * words<Math>(head_dim_));
    v_transposed_ = scratch.take<Word>(round_up(kKeys, kPanel<Math>) * words<Math>(head_dim_v_));
    if (params.softcap > 0) slope_ = scratch.take<S>(kStride);
  }

  const BandMask& mask() const { return mask_; }

  void load_keys(int64_t kv0, int keys) {
    kv0_ = kv0;
    keys_ = keys;
    const auto k = kv_rows<const T>(params_.k, extent_.seq, extent_.head_kv),
               v = kv_rows<const T>(params_.v, extent_.seq, extent_.head_kv);
    pack_panels_transposed<Math>([&](int64_t n) { return k[kv0 + n]; }, keys, head_dim_,
                                 k_transposed_);
    pack_panels_transposed<Math>([&](int64_t n) { return v[kv0 + n]; }, keys, head_dim_v_,
                                 v_transposed_);
  }

  // Fills p (as multiplied with v: after dropout) and ds; false where no row sees a key. ds is the
  // gradient of scale · q·k or, with of_mask, that of the score after softcap.
  bool compute(const RowBlock& block, bool of_mask) {
    seen_begin = int(std::max<int64_t>(block.keys.begin - kv0_, 0));
    seen_end = int(std::min<int64_t>(block.keys.end - kv0_, keys_));
    if (seen_begin >= seen_end) return false;
    out_begin = seen_begin / kStep * kStep;
    out_end = int(round_up(seen_end, kStep));

    for (int i = 0; i < block.count; ++i) {
      const Row row = row_at(params_, extent_, block.begin + i);
      pack_row<Math>(q_rows<const T>(params_.q, extent_.seq, row.head)[row.query], head_dim_,
                     q_ + i * q_ld_);
      pack_row<Math>(q_rows<const T>(params_.grad_o, extent_.seq, row.head)[row.query], head_dim_v_,
                     do_ + i * do_ld_);
    }
    for (int j = seen_begin / kPanel<Math> * kPanel<Math>; j < seen_end; j += kPanel<Math>) {
      const int columns = std::min(seen_end - j, kPanel<Math>);
      multiply_panel<Math>(block.count, columns, words<Math>(head_dim_), q_, q_ld_,
                           k_transposed_ + j * words<Math>(head_dim_), p + j, kStride, false);
      multiply_panel<Math>(block.count, columns, words<Math>(head_dim_v_), do_, do_ld_,
                           v_transposed_ + j * words<Math>(head_dim_v_), ds + j, kStride, false);
    }
    for (int i = 0; i < block.count; ++i)
      finish_row(row_at(params_, extent_, block.begin + i), i, of_mask);
    return true;
  }

 private:
  // From q·k and do·v: p = exp(score - lse), ds = p (keep · do·v - delta).
  void finish_row(Row row, int i, bool of_mask) {
    S *p_row = p + i * kStride, *ds_row = ds + i * kStride;
    const KeyRange visible = mask_.visible(row.query);
    const int begin = int(std::clamp<int64_t>(visible.begin - kv0_, seen_begin, seen_end));
    const int end = int(std::clamp<int64_t>(visible.end - kv0_, seen_begin, seen_end));
    const S lse = lse_of<S>(params_, params_.lse, extent_.seq, row.head)[row.query];
    const bool empty = begin >= end || lse == -std::numeric_limits<S>::infinity();
    const int from = empty ? out_end : begin / kStep * kStep,
              to = empty ? out_end : int(round_up(end, kStep));
    const auto zero_fill = [&](int j, int j_end) {
      for (; j < j_end; j += V::kLanes) V::zero().store(p_row + j), V::zero().store(ds_row + j);
    };
    zero_fill(out_begin, from);
    zero_fill(to, out_end);
    if (empty) return;

    const S* keep = scores_.has_dropout() ? scores_.keep(row, kv0_, begin, end) : nullptr;
    const S* slope = params_.softcap > 0 && !of_mask ? slope_ : nullptr;
    const S delta = delta_of<T, S>(params_, extent_.seq, row);
    if (scores_.general()) {
      scores_.apply(row, kv0_, begin, end, p_row, slope_);
      finish_lanes<true>(p_row, ds_row, begin, end, from, to, S(1), lse, delta, keep, slope);
    } else {
      finish_lanes<false>(p_row, ds_row, begin, end, from, to, S(params_.scale), lse, delta, keep,
                          slope);
    }
  }

  template <bool kGeneral>
  static void finish_lanes(S* p_row, S* ds_row, int begin, int end, int from, int to, S scale,
                           S lse, S delta, const S* keep, const S* slope) {
    const ExpOf<S, kGeneral> exp_of(scale, lse);
    const V minus = V::all(delta);
    for (int j = from; j < to; j += V::kLanes) {
      const V p = exp_of(V::load(p_row + j));
      V dp = V::load(ds_row + j), kept = p;
      if (keep) {
        dp = dp * V::load(keep + j);
        kept = p * V::load(keep + j);
      }
      V ds = p * (dp - minus);
      if (slope) ds = ds * V::load(slope + j);
      if (kGeneral)
        ds = select(equal(p, V::zero()), V::zero(), ds);  // whatever a masked value holds
      if (j < begin || j + V::kLanes > end) {
        const auto inside = V::both(V::first(end - j), V::first_not(begin - j));
        kept = select(inside, kept, V::zero());
        ds = select(inside, ds, V::zero());
      }
      kept.store(p_row + j);
      ds.store(ds_row + j);
    }
  }

  const AttnBwdParams& params_;
  const Extent& extent_;
  BandMask mask_;
  Scores<S> scores_;
  int head_dim_, head_dim_v_;
  int64_t q_ld_, do_ld_;
  Word *q_, *do_, *k_transposed_, *v_transposed_;
  S* slope_ = nullptr;
  int64_t kv0_ = 0;
  int keys_ = 0;
};

// rows of acc, times factor, into rows of to.
template <typename T, typename S>
inline void store_rows(const S* acc, int64_t acc_ld, int64_t rows, int columns, S factor,
                       Rows<T> to) {
  using V = Vec<S>;
  for (int64_t i = 0; i < rows; ++i)
    for (int j = 0; j < columns; j += V::kLanes)
      (V::load(acc + i * acc_ld + j) * V::all(factor)).store(to[i] + j, columns - j);
}

template <typename T, typename Math>
void bwd(const AttnBwdParams& p, const BwdTask& t, Scratch& scratch) {
  using Tile = BwdTile<T, Math>;
  using S = typename Math::Acc;
  using Word = typename Math::Word;
  using V = Vec<S>;
  constexpr int kKeys = Tile::kKeys, kRows = Tile::kRows, kStride = Tile::kStride;
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v);
  const int64_t ld = round_up(head_dim, kLanes<Math>), ld_v = round_up(head_dim_v, kLanes<Math>);
  const int64_t rows = t.row_end - t.row_begin;

  Tile tile(p, t, scratch);
  Word* k_pack = scratch.take<Word>(round_up(head_dim, kPanel<Math>) * words<Math>(kKeys));
  Word* q_pack = scratch.take<Word>(round_up(head_dim, kPanel<Math>) * words<Math>(kRows));
  Word* do_pack = scratch.take<Word>(round_up(head_dim_v, kPanel<Math>) * words<Math>(kRows));
  S* dq = t.want_dq ? scratch.take<S>(rows * ld) : nullptr;
  S* dk = t.want_dkv ? scratch.take<S>(kKeys * ld) : nullptr;
  S* dv = t.want_dkv ? scratch.take<S>(kKeys * ld_v) : nullptr;
  if (dq) std::fill_n(dq, rows * ld, S(0));

  // Words of p and ds: the same memory where a word is a number.
  constexpr bool kPairs = Math::kWordElements == 2;
  Word *p_by_key, *ds_by_key, *ds_by_row;
  if constexpr (kPairs) {
    p_by_key = scratch.take<Word>(kRows / 2 * kStride);
    ds_by_key = scratch.take<Word>(kRows / 2 * kStride);
    ds_by_row = scratch.take<Word>(kRows * kStride / 2);
  } else {
    p_by_key = tile.p;
    ds_by_key = ds_by_row = tile.ds;
  }
  const auto convert = [&](int count) {
    if constexpr (kPairs) {
      for (int i = 0; i < count; i += 2) {
        const bool both = i + 1 < count;
        const S *p0 = tile.p + i * kStride, *ds0 = tile.ds + i * kStride;
        for (int j = tile.out_begin; j < tile.out_end; j += 2 * V::kLanes) {
          V low[2], high[2];
          for (int u = 0; u < 2; ++u) {
            const int at = j + u * V::kLanes;
            low[u] = V::load(ds0 + at);
            high[u] = both ? V::load(ds0 + kStride + at) : V::zero();
            const V pair[2] = {low[u], high[u]},
                    p_pair[2] = {V::load(p0 + at), both ? V::load(p0 + kStride + at) : V::zero()};
            Math::store_interleaved(ds_by_key + i / 2 * kStride + at, pair);
            Math::store_interleaved(p_by_key + i / 2 * kStride + at, p_pair);
          }
          Math::store_operand(ds_by_row + i * (kStride / 2) + j / 2, low);
          if (both) Math::store_operand(ds_by_row + (i + 1) * (kStride / 2) + j / 2, high);
        }
      }
    }
  };

  const Rows<const T> k = kv_rows<const T>(p.k, t.seq, t.head_kv);
  for (int64_t kv0 = t.kv_begin; kv0 < t.kv_end; kv0 += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, t.kv_end - kv0));
    tile.load_keys(kv0, keys);
    if (t.want_dq) pack_panels<Math>([&](int64_t n) { return k[kv0 + n]; }, keys, head_dim, k_pack);
    if (t.want_dkv) {
      std::fill_n(dk, keys * ld, S(0));
      std::fill_n(dv, keys * ld_v, S(0));
    }
    for_each_block<kRows>(t, tile.mask(), [&](const RowBlock& block) {
      if (!tile.compute(block, false)) return;
      convert(block.count);
      if (t.want_dkv) {
        const auto row_of = [&](const TensorView& x) {
          return [&, x](int64_t i) {
            const Row row = row_at(p, t, block.begin + i);
            return q_rows<const T>(x, t.seq, row.head)[row.query];
          };
        };
        const int seen = tile.seen_end - tile.seen_begin;
        const int64_t depth = words<Math>(block.count);
        pack_panels<Math>(row_of(p.grad_o), block.count, head_dim_v, do_pack);
        multiply<Math, true>(seen, head_dim_v, depth, p_by_key + tile.seen_begin, kStride, do_pack,
                             depth, dv + tile.seen_begin * ld_v, ld_v, true);  // dv += pᵀ do
        pack_panels<Math>(row_of(p.q), block.count, head_dim, q_pack);
        multiply<Math, true>(seen, head_dim, depth, ds_by_key + tile.seen_begin, kStride, q_pack,
                             depth, dk + tile.seen_begin * ld, ld, true);  // dk += dsᵀ q
      }
      if (t.want_dq) {
        const int64_t k0 = tile.out_begin / Math::kWordElements;
        const int64_t depth = words<Math>(std::min(tile.out_end, keys)) - k0;
        multiply<Math>(block.count, head_dim, depth, ds_by_row + k0, kStride / Math::kWordElements,
                       k_pack + k0 * kPanel<Math>, words<Math>(keys),
                       dq + (block.begin - t.row_begin) * ld, ld,
                       true);  // dq += ds k
      }
    });
    if (t.want_dkv) {
      const Rows<T> dk_rows = kv_rows<T>(p.dk, t.seq, t.head_kv),
                    dv_rows = kv_rows<T>(p.dv, t.seq, t.head_kv);
      store_rows<T>(dk, ld, keys, head_dim, S(p.scale), Rows<T>{dk_rows[kv0], dk_rows.stride});
      store_rows<T>(dv, ld_v, keys, head_dim_v, S(1), Rows<T>{dv_rows[kv0], dv_rows.stride});
    }
  }
  if (t.want_dq)
    for (int64_t r = 0; r < rows; ++r) {
      const Row row = row_at(p, t, t.row_begin + r);
      store_rows<T>(dq + r * ld, ld, 1, head_dim, S(p.scale),
                    Rows<T>{q_rows<T>(p.dq, t.seq, row.head)[row.query], 0});
    }
}

// The mask's gradient: ds summed over everything that read the same element.
template <typename T, typename Math>
void bwd_mask(const AttnBwdParams& p, const Sequence* sequences, const MaskGradTask& t,
              Scratch& scratch) {
  using Tile = BwdTile<T, Math>;
  using S = typename Math::Acc;
  const int64_t group = p.heads_q / p.heads_kv;
  for (int64_t b = t.batch_begin; b < t.batch_end; ++b) {
    const Sequence& seq = sequences[b];
    for (int64_t head = t.head_begin; head < t.head_end; ++head) {
      const int64_t row0 = head % group * seq.seq_q;
      const Extent extent{seq,
                          head / group,
                          row0 + std::min(t.q_begin, seq.seq_q),
                          row0 + std::min(t.q_end, seq.seq_q),
                          std::min(t.kv_begin, seq.seq_kv),
                          std::min(t.kv_end, seq.seq_kv)};
      if (extent.row_begin >= extent.row_end) continue;
      Tile tile(p, extent, scratch);
      for (int64_t kv0 = extent.kv_begin; kv0 < extent.kv_end; kv0 += Tile::kKeys) {
        tile.load_keys(kv0, int(std::min<int64_t>(Tile::kKeys, extent.kv_end - kv0)));
        for_each_block<Tile::kRows>(extent, tile.mask(), [&](const RowBlock& block) {
          if (!tile.compute(block, true)) return;
          for (int i = 0; i < block.count; ++i) {
            S* to = static_cast<S*>(p.dmask) + b * p.dmask_batch_stride +
                    head * p.dmask_head_stride + (block.begin + i - row0) * p.dmask_q_stride +
                    kv0 * p.dmask_kv_stride;
            const S* ds = tile.ds + i * Tile::kStride;
            for (int j = tile.seen_begin; j < tile.seen_end; ++j)
              to[j * p.dmask_kv_stride] += ds[j];
          }
        });
      }
      scratch.reset();
    }
  }
}

// A sink is a key of score sinks[head] whose value row is 0: its gradient is -exp(sink - lse) delta, summed.
template <typename T, typename Math>
void bwd_sink(const AttnBwdParams& p, const Sequence* sequences, int64_t head) {
  using S = typename Math::Acc;
  const S sink = static_cast<const S*>(p.sinks)[head];
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& seq = sequences[b];
    const S* lse = lse_of<S>(p, p.lse, seq, head);
    for (int64_t i = 0; i < seq.seq_q; ++i)
      if (lse[i] != -std::numeric_limits<S>::infinity())
        sum -= std::exp(sink - lse[i]) * delta_of<T, S>(p, seq, Row{head, i});
  }
  static_cast<S*>(p.dsinks)[head] = S(sum);
}

}  // namespace flash_ext::cpu::FX_ISA
