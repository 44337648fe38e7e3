// From q·k to the score: scale, softcap, ALiBi, mask (docs/design.md, section 2), a row at a time.
#pragma once
#include <array>
#include <cmath>
#include <limits>

#include "dropout.h"
#include "problem.h"

namespace flash_ext::cpu::FX_ISA {

template <typename S>
class Scores {
 public:
  Scores(const AttnParams& p, const Sequence& seq, int64_t width, Scratch& scratch)
      : p_(p), seq_(seq), has_bias_(p.mask.data || p.alibi_slopes),
        has_dropout_(p.dropout_threshold != 0) {
    if (has_bias_) bias_ = scratch.take<S>(width + kPad);
    if (has_dropout_) keep_ = scratch.take<S>(width + kPad);
  }

  // False: the score is scale · q·k, which the exponential's own multiplication takes care of.
  bool general() const { return has_bias_ || p_.softcap > 0; }
  bool has_dropout() const { return has_dropout_; }

  // s[begin, end) = the scores of this row with keys kv0 + begin to kv0 + end, from q·k. Elements
  // outside, up to a whole vector, become anything. slope, where given, is d score / d (scale q·k).
  void apply(Row row, int64_t kv0, int begin, int end, S* s, S* slope = nullptr) {
    using V = Vec<S>;
    if (has_bias_) fill_bias(row, kv0, begin, end);
    const V scale = V::all(S(p_.scale)), cap = V::all(S(p_.softcap)),
            inverse_cap = V::all(S(1 / p_.softcap));
    for (int j = begin / V::kLanes * V::kLanes; j < end; j += V::kLanes) {
      V x = V::load(s + j) * scale;
      if (p_.softcap > 0) {
        const V t = tanh(x * inverse_cap);
        x = t * cap;
        if (slope) fnma(t, t, V::all(S(1))).store(slope + j);
      }
      if (has_bias_) x = x + V::load(bias_ + j);
      x.store(s + j);
    }
  }

  // keep[begin, end) = 0 where dropped, else 1 / (1 - p).
  const S* keep(Row row, int64_t kv0, int begin, int end) {
    const uint32_t batch_head = uint32_t(seq_.batch * p_.heads_q + row.head);
    fill_keep(p_, batch_head, uint32_t(row.query), kv0, begin, end, keep_);
    return keep_;
  }

 private:
  static constexpr int kPad = 64;  // vectors may be read and written past the last key

  void fill_bias(Row row, int64_t kv0, int begin, int end) {
    const MaskView& m = p_.mask;
    const int64_t first = seq_.batch * m.batch_stride + row.head * m.head_stride +
                          row.query * m.q_stride + (kv0 + begin) * m.kv_stride;
    if (!p_.alibi_slopes) {  // a mask of keys alone gives many rows the same bias
      const std::array<int64_t, 4> filled{first, kv0, begin, end};
      if (filled == filled_) return;
      filled_ = filled;
    }
    if (p_.alibi_slopes) {
      const S slope =
          static_cast<const S*>(p_.alibi_slopes)[seq_.batch * p_.alibi_batch_stride + row.head];
      const int64_t diagonal = row.query + seq_.seq_kv - seq_.seq_q - kv0;
      for (int j = begin; j < end; ++j) bias_[j] = -slope * S(std::abs(diagonal - j));
    } else {
      std::fill(bias_ + begin, bias_ + end, S(0));
    }
    if (!m.data) return;
    switch (m.dtype) {
      case DType::b8: return add_mask<uint8_t>(first, begin, end);
      case DType::f16: return add_mask<half_t>(first, begin, end);
      case DType::bf16: return add_mask<bf16_t>(first, begin, end);
      case DType::f32: return add_mask<float>(first, begin, end);
      case DType::f64: return add_mask<double>(first, begin, end);
    }
  }

  template <typename M>
  void add_mask(int64_t first, int begin, int end) {
    using V = Vec<S>;
    const M* mask = static_cast<const M*>(p_.mask.data) + first;
    const int64_t stride = p_.mask.kv_stride;
    S* bias = bias_ + begin;
    int j = 0;
    if constexpr (std::is_same_v<M, uint8_t>) {
      if (stride == 1)  // without a branch, so that it is vectorised
        for (; j < end - begin; ++j)
          bias[j] = mask[j] ? bias[j] : -std::numeric_limits<S>::infinity();
    } else if constexpr (sizeof(M) == 2 && sizeof(S) == 4) {
      if (stride == 1)
        for (; j + V::kLanes <= end - begin; j += V::kLanes)
          (V::load(bias + j) + V::load(mask + j)).store(bias + j);
    } else if constexpr (sizeof(M) >= 4) {
      if (stride == 1)
        for (; j < end - begin; ++j) bias[j] += S(mask[j]);
    }
    for (; j < end - begin; ++j) bias[j] += addend(mask[j * stride]);
  }
  static S addend(uint8_t keep) { return keep ? S(0) : -std::numeric_limits<S>::infinity(); }
  static S addend(float x) { return S(x); }
  static S addend(double x) { return S(x); }
  static S addend(bf16_t x) { return to_float(x); }
  static S addend(half_t x) { return to_float(x); }

  const AttnParams& p_;
  const Sequence& seq_;
  bool has_bias_, has_dropout_;
  std::array<int64_t, 4> filled_{-1};  // what bias_ holds: fill_bias
  S* bias_ = nullptr;
  S* keep_ = nullptr;
};

// The running maximum and sum of one row's softmax.
template <typename S>
struct SoftmaxState {
  S top = -std::numeric_limits<S>::infinity();  // in units of the score
  S sum = 0;                                    // of exp(score - top)
};

// Online softmax (Milakov and Gimelshein, 2018) of s[begin, end): writes exp(s - top) to probs over
// [out_begin, out_end), 0 outside [begin, end), and returns what to multiply earlier results with.
// Without kGeneral s is still q·k and the score scale · s. keep is the dropout factor, or null; it
// does not enter the sum. out_begin and out_end are multiples of a word vector.
template <typename Math, bool kGeneral, typename S = typename Math::Acc>
inline S softmax_step(SoftmaxState<S>& state, const S* s, int begin, int end, S scale,
                      const S* keep, typename Math::Word* probs, int out_begin, int out_end) {
  using V = Vec<S>;
  constexpr S kInf = std::numeric_limits<S>::infinity();
  constexpr int kL = V::kLanes, kStep = kL * Math::kWordElements;
  const auto zero_fill = [&](int from, int to) {
    V zeros[Math::kWordElements];
    for (V& z : zeros) z = V::zero();
    for (int j = from; j < to; j += kStep)
      Math::store_operand(probs + j / Math::kWordElements, zeros);
  };
  // Lanes of vector j that are inside [begin, end).
  const auto inside = [&](int j) { return V::both(V::first(end - j), V::first_not(begin - j)); };
  if (begin >= end) {
    zero_fill(out_begin, out_end);
    return S(1);
  }
  const int first_full = (begin + kL - 1) / kL * kL, last_full = end / kL * kL;

  V top = V::all(-kInf);
  if (begin < first_full)
    top = select(inside(first_full - kL), max(V::load(s + first_full - kL), top), top);
  V top2 = top;
  int j = first_full;
  for (; j + kL < last_full; j += 2 * kL) {
    top = max(V::load(s + j), top);
    top2 = max(V::load(s + j + kL), top2);
  }
  if (j < last_full) top = max(V::load(s + j), top);
  if (last_full < end && last_full >= first_full)
    top = select(inside(last_full), max(V::load(s + last_full), top), top);
  const S block_top = reduce_max(max(top2, top)) * (kGeneral ? S(1) : scale);
  const S new_top = block_top > state.top ? block_top : state.top;

  if (new_top == -kInf) {  // nothing visible yet, or nothing but NaN, which max passes over
    for (int i = begin; i < end; ++i)
      if (s[i] != s[i]) state.sum = s[i];
    zero_fill(out_begin, out_end);
    return S(1);
  }
  const S rescale = state.top == new_top ? S(1) : std::exp(state.top - new_top);

  V sum = V::zero();
  const ExpOf<S, kGeneral> exp_of(scale, new_top);
  const int from = begin / kStep * kStep, to = (end + kStep - 1) / kStep * kStep;
  zero_fill(out_begin, std::min(from, out_end));
  for (int at = from; at < to; at += kStep) {
    V p[Math::kWordElements];
#pragma GCC unroll 2
    for (int u = 0; u < Math::kWordElements; ++u) {
      const int i = at + u * kL;
      const bool whole = i >= begin && i + kL <= end;
      V x = exp_of(V::load(s + i));
      if (!whole) x = select(inside(i), x, V::zero());
      sum = sum + x;
      if (keep) x = x * V::load(keep + i);
      if (keep && !whole) x = select(inside(i), x, V::zero());  // keep is anything there
      p[u] = x;
    }
    Math::store_operand(probs + at / Math::kWordElements, p);
  }
  zero_fill(std::max(to, out_begin), out_end);
  state.sum = state.sum * rescale + reduce_add(sum);
  state.top = new_top;
  return rescale;
}

}  // namespace flash_ext::cpu::FX_ISA
