// Forward for few rows (decode): bound by reading K and V, which are read once, where they lie, for
// all query heads of the group.
#pragma once
#include "fwd.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kFewRows = 8;

// s[r * stride + n] = q[r] · k[n] for kRows rows of words and n in [0, keys).
template <typename T, typename Math, int kRows>
inline void few_scores(const typename Math::Word* q, int64_t q_ld, Rows<const T> k, int keys,
                       int head_dim, typename Math::Acc* s, int64_t stride) {
  using S = typename Math::Acc;
  using V = Vec<S>;
  constexpr int kStep = V::kLanes * Math::kWordElements;
  constexpr int kKeysAtOnce = std::max(V::kLanes / kRows, 1),
                kSums = kRows * kKeysAtOnce;  // a vector of results
  for (int n0 = 0; n0 < keys; n0 += kKeysAtOnce) {
    const int n = std::max(std::min(n0, keys - kKeysAtOnce), 0);  // the last step repeats some keys
    for (int u = 0; u < kKeysAtOnce; ++u) prefetch_ahead(k[n + u], head_dim);
    V sum[kSums];
#pragma GCC unroll 16
    for (V& x : sum) x = V::zero();
    for (int d = 0; d < head_dim; d += kStep) {
      typename Math::Words q_words[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        q_words[r] = Math::load(q + r * q_ld + d / Math::kWordElements);
#pragma GCC unroll 16
      for (int u = 0; u < kKeysAtOnce; ++u) {
        const auto k_words =
            Math::as_words(load_words<Math>(k[std::min(n + u, keys - 1)] + d, head_dim - d));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          sum[r * kKeysAtOnce + u] = Math::mac(sum[r * kKeysAtOnce + u], k_words, q_words[r]);
      }
    }
    alignas(64) S results[kSums];
#pragma GCC unroll 4
    for (int i = 0; i < kSums; i += V::kLanes)
      reduce_add_each(reinterpret_cast<const V(&)[V::kLanes]>(sum[i])).store(results + i);
    const int count = std::min(kKeysAtOnce, keys - n);
    for (int r = 0; r < kRows; ++r)
      std::copy_n(results + r * kKeysAtOnce, count, s + r * stride + n);
  }
}

// acc[r * acc_ld + j] += sum over n of probs[r * stride + n] · v[n][j].
template <typename T, typename S, int kRows>
inline void few_products(const S* probs, int64_t stride, Rows<const T> v, int begin, int end,
                         int head_dim_v, S* acc, int64_t acc_ld) {
  using V = Vec<S>;
  constexpr int kVectors = kRows >= 8 ? 2 : kRows >= 4 ? 4 : 8;
  const auto columns = [&]<int kCount>(int j) {
    V sum[kRows][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) sum[r][c] = V::load(acc + r * acc_ld + j + c * V::kLanes);
    for (int n = begin; n < end; ++n) {
      V x[kCount];
      const T* row = v[n] + j;
      if (j == 0) prefetch_ahead(v[n], head_dim_v);
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c)  // only a single vector may stand over the end
        x[c] = kCount > 1 || head_dim_v - j >= V::kLanes ? V::load(row + c * V::kLanes)
                                                         : V::load(row, head_dim_v - j);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const V p = V::all(probs[r * stride + n]);
#pragma GCC unroll 8
        for (int c = 0; c < kCount; ++c) sum[r][c] = fma(p, x[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) sum[r][c].store(acc + r * acc_ld + j + c * V::kLanes);
  };
  int j = 0;
  for (; j + kVectors * V::kLanes <= head_dim_v; j += kVectors * V::kLanes)
    columns.template operator()<kVectors>(j);
  for (; j < head_dim_v; j += V::kLanes) columns.template operator()<1>(j);
}

template <typename T, typename Math, int kRows>
void fwd_rows(const AttnParams& p, const FwdTask& t, const FwdParts& parts, Scratch& scratch) {
  using S = typename Math::Acc;
  using Word = typename Math::Word;
  using V = Vec<S>;
  constexpr int kKeys = 512, kStride = kKeys + V::kLanes;
  const int head_dim = int(p.head_dim), head_dim_v = int(p.head_dim_v),
            rows = int(t.row_end - t.row_begin);
  const int64_t q_ld = round_up(words<Math>(head_dim), V::kLanes),
                acc_ld = round_up(head_dim_v, V::kLanes);
  const BandMask mask(p, t.seq.seq_q, t.seq.seq_kv);

  Word* q = scratch.take<Word>(kRows * q_ld);
  S* s = scratch.take<S>(kRows * kStride);
  S* acc = scratch.take<S>(kRows * acc_ld);
  Scores<S> scores(p, t.seq, kKeys, scratch);
  SoftmaxState<S> state[kRows];
  std::fill_n(q, kRows * q_ld, Word(0));
  std::fill_n(acc, kRows * acc_ld, S(0));
  std::fill_n(s, kRows * kStride, S(0));  // rows beyond the last are multiplied too

  KeyRange all{t.kv_end, t.kv_begin};
  Row row[kRows];
  for (int i = 0; i < rows; ++i) {
    row[i] = row_at(p, t, t.row_begin + i);
    pack_row<Math>(q_rows<const T>(p.q, t.seq, row[i].head)[row[i].query], head_dim, q + i * q_ld);
    const KeyRange visible = mask.visible(row[i].query);
    if (visible.begin >= visible.end) continue;
    all.begin = std::min(all.begin, std::max(visible.begin, t.kv_begin));
    all.end = std::max(all.end, std::min(visible.end, t.kv_end));
  }

  const Rows<const T> k = kv_rows<const T>(p.k, t.seq, t.head_kv),
                      v = kv_rows<const T>(p.v, t.seq, t.head_kv);
  for (int64_t kv0 = all.begin; kv0 < all.end; kv0 += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, all.end - kv0));
    few_scores<T, Math, kRows>(q, q_ld, {k[kv0], k.stride}, keys, head_dim, s, kStride);
    for (int i = 0; i < rows; ++i) {
      const KeyRange visible = mask.visible(row[i].query);
      const int begin = int(std::clamp<int64_t>(visible.begin - kv0, 0, keys));
      const int end = int(std::clamp<int64_t>(visible.end - kv0, 0, keys));
      S* s_row = s + i * kStride;
      const S* keep = scores.has_dropout() ? scores.keep(row[i], kv0, begin, end) : nullptr;
      S rescale;
      if (scores.general()) {
        scores.apply(row[i], kv0, begin, end, s_row);
        rescale = softmax_step<PlainMath<S>, true>(state[i], s_row, begin, end, S(1), keep, s_row,
                                                   0, int(round_up(keys, V::kLanes)));
      } else {
        rescale = softmax_step<PlainMath<S>, false>(state[i], s_row, begin, end, S(p.scale), keep,
                                                    s_row, 0, int(round_up(keys, V::kLanes)));
      }
      if (rescale != 1)
        for (int64_t j = 0; j < acc_ld; j += V::kLanes)
          (V::load(acc + i * acc_ld + j) * V::all(rescale)).store(acc + i * acc_ld + j);
    }
    few_products<T, S, kRows>(s, kStride, {v[kv0], v.stride}, 0, keys, head_dim_v, acc, acc_ld);
  }
  for (int i = 0; i < rows; ++i)
    finish_row<T>(p, t, parts, t.row_begin + i, state[i], acc + i * acc_ld);
}

template <typename T, typename Math>
void fwd_few_rows(const AttnParams& p, const FwdTask& t, const FwdParts& parts, Scratch& scratch) {
  const int64_t rows = t.row_end - t.row_begin;
  if (rows <= 1) fwd_rows<T, Math, 1>(p, t, parts, scratch);
  else if (rows <= 2) fwd_rows<T, Math, 2>(p, t, parts, scratch);
  else if (rows <= 4) fwd_rows<T, Math, 4>(p, t, parts, scratch);
  else fwd_rows<T, Math, kFewRows>(p, t, parts, scratch);
}

}  // namespace flash_ext::cpu::FX_ISA
