// Options in the Hopper backward: from transposed products, [keys, rows], to weights and their gradients
// under softcap, ALiBi, mask tensors and dropout, as attn/bwd_scores.h has them.
#pragma once
#include "../attn/bwd_task.h"
#include "../attn/scores.h"
#include "../tile/async_copy.h"
#include "bwd_args.h"
#include "warpgroup.h"

namespace flash_ext::sm90 {

// A bit for each score that a lane holds of a warp's [16, kCols].
template <int kCols>
struct ScoreBits {
  uint32_t word[kCols / 64];  // of register i of atom n, bit 4 i + n % 4

  FX_DEVICE void fill(bool x) {
    for (uint32_t& w : word) w = x ? ~0u : 0;
  }
  // Of atom n, where all are still zero; bit 4 i is that of register i.
  FX_DEVICE void add(int n, uint32_t bits) { word[n / 4] |= bits << n % 4; }
  FX_DEVICE void keep(const ScoreBits& other) {
#pragma unroll
    for (int i = 0; i < kCols / 64; ++i) word[i] &= other.word[i];
  }
  FX_DEVICE bool at(int n, int i) const { return word[n / 4] & 1u << (4 * i + n % 4); }
};

// How a mask comes to scores. Bool ones are a matter of bits.
enum class MaskForm {
  none,
  same,    // of the tensors' dtype: through shared memory
  single,  // float32: each lane reads its own elements where they are
};

template <MaskForm kMask>
using ConstantForm = std::integral_constant<MaskForm, kMask>;

// Two neighbours of an operand.
template <typename T>
FX_DEVICE float2 widened(uint32_t pair) {
  if constexpr (std::is_same_v<T, half_t>)
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  else return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// dst += x where `weight` is not zero; without a branch, so that other work is moved around it.
FX_DEVICE void add_where(float weight, float* dst, float x) {
  asm volatile(
      "{\n.reg .pred there;\nsetp.neu.f32 there, %0, 0f00000000;\n"
      "@there red.global.add.f32 [%1], %2;\n}" ::"f"(weight),
      "l"(dst), "f"(x)
      : "memory");
}

// cp.async of 16 or 8 bytes, both aligned to as many.
template <typename E>
FX_DEVICE void copy_eight(E* dst_smem, const E* src) {
  if constexpr (sizeof(E) == 2) copy_async(dst_smem, src, 16);
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(ptx::shared_address(dst_smem)),
                 "l"(src)
                 : "memory");
}

// Of a warp's 16 keys from key0 on. What does not depend on products is done while they run: a block
// ahead, a mask's elements are copied to shared memory, eight keys of a row together, where they are
// found transposed; bool ones become bits, as do the weights that dropout keeps.
template <typename Config>
class BwdScores {
  using T = typename Config::T;
  using Atom = MmaAtom<T>;
  using Acc = typename Atom::Acc;
  using Scores = typename Config::Scores;
  using Weights = typename Config::Weights;
  using Stats = typename Config::Stats;
  static constexpr int kRows = Config::kBlockQ, kAtoms = kRows / kAtom;

 public:
  struct MaskRows {
    uint4 eight[kAtoms][kWarpSize];  // keys, in the order of ldmatrix's rows
  };

  FX_DEVICE BwdScores(const AttnBwdParams& p, const BwdTask& task, MaskRows& rows, int key0)
      : p(p), task(task), rows(rows), key0(key0) {}

  // What can be known of a block long before its products.
  FX_DEVICE void look_ahead(int of_head, int block) {
    fetch(of_head, block);
    draw(of_head, block);
  }
  // Its parts, for where they are best apart: starts to copy the mask, ...
  FX_DEVICE void fetch(int of_head, int block) { fetch_mask(task.head + of_head, block); }
  // ... finds which weights dropout keeps.
  FX_DEVICE void draw(int of_head, int block) {
    if constexpr (Config::kDropout) draw_kept(task.head + of_head, block);
  }

  // ... and while its first product runs.
  FX_DEVICE void prepare(int of_head, int block) {
    head = task.head + of_head, row0 = block * kRows;
    slope = 0.f;
    if (p.alibi_slopes)
      slope = kLog2e *
              static_cast<const float*>(p.alibi_slopes)[task.batch * p.alibi_batch_stride + head];
    here = static_cast<float>(row0 + Atom::col(0) + task.seq_kv - task.rows - key0 - Atom::row(0));
    see(block);
    if (p.mask.data) {
      copy_wait<0>();
      __syncwarp();  // all of the mask is there
      if (p.mask.dtype == DType::b8) read_bools();
    }
  }

  // s = k q^T become weights; with a softcap, they become tanh, and the rest is left to `differentiate`.
  FX_DEVICE void weigh(Scores& s, const Stats& stats) const {
    if (p.softcap > 0) {
      const float inside =
          static_cast<float>(p.scale) * fast_reciprocal(static_cast<float>(p.softcap));
      s.for_each([&](float& x, int, int, int) { x = fast_tanh(x * inside); });
    } else {
      with_form([&](auto form) {
        const float scale = static_cast<float>(p.scale) * kLog2e;
#pragma unroll
        for (int n = 0; n < kAtoms; ++n)
          s.atom[0][n] = weights_of<form()>(s.atom[0][n], scale, n, stats);
      });
    }
  }

  // s = k q^T becomes the weights that dropout keeps, and, for who computes the gradients of scores without
  // s, by what a score's gradient is a multiple of its weight's, less its row's delta; negative where
  // dropout drops the weight.
  FX_DEVICE void weigh(const Scores& s, Weights& weights, Weights& factors,
                       const Stats& stats) const {
    with_form([&](auto form) {
      if (p.softcap > 0) weights_and_factors<true, form()>(s, weights, factors, stats);
      else weights_and_factors<false, form()>(s, weights, factors, stats);
    });
  }

  // From what `weigh` left in s, and dp = v grad_o^T, to the weights that dropout keeps, and the
  // gradients of scores before their scale.
  FX_DEVICE void differentiate(const Scores& s, const Scores& dp, Weights& weights, Weights& ds,
                               const Stats& stats) const {
    const auto all = [&](auto dmask) {
      constexpr bool kDmask = decltype(dmask)::value;
      if (p.softcap > 0)
        with_form([&](auto form) { gradients<true, form(), kDmask>(s, dp, weights, ds, stats); });
      else gradients<false, MaskForm::none, kDmask>(s, dp, weights, ds, stats);
    };
    if (p.dmask) all(std::true_type{});
    else all(std::false_type{});
  }

 private:
  const AttnBwdParams& p;
  const BwdTask& task;
  MaskRows& rows;
  const int key0;
  int head, row0;  // the block's
  float slope;     // to base 2
  float here;      // from this lane's first key to the one at distance 0 of its first row
  ScoreBits<kRows> seen, kept;

  FX_DEVICE void fetch_mask(int head, int block) {
    if (!p.mask.data) return;
    __syncwarp();  // nobody reads the last block's any more
    with_elements(p.mask, [&](const auto* elements) {
      using E = std::remove_cvref_t<decltype(*elements)>;
      if constexpr (std::is_same_v<E, T> || std::is_same_v<E, uint8_t>) {
        const MaskView& mask = p.mask;
        const int64_t strides = mask.batch_stride | mask.head_stride | mask.q_stride | p.seq_kv;
        const bool in_eights = mask.kv_stride == 1 && strides % 8 == 0 &&
                               reinterpret_cast<uintptr_t>(mask.data) % (8 * sizeof(E)) == 0;
        const int lane = lane_id(), key = key0 + lane / 8 % 2 * 8;
        const int last = static_cast<int>(p.seq_kv) - 1;  // what follows is not seen
        elements += task.batch * mask.batch_stride + head * mask.head_stride;
#pragma unroll
        for (int n = 0; n < kAtoms; ++n) {
          const int row = block * kRows + n * kAtom + lane / 16 * 8 + lane % 8;
          const E* from = elements + std::min(row, task.rows - 1) * mask.q_stride;
          E* to = reinterpret_cast<E*>(&rows.eight[n][lane]);
          if (in_eights) copy_eight(to, from + std::min(key, last - 7));
          else
            for (int i = 0; i < 8; ++i) to[i] = from[std::min(key + i, last) * mask.kv_stride];
        }
        copy_commit();
      }
    });
  }

  // Which scores band masks, and the ends of the sequence, leave.
  FX_DEVICE void see(int block) {
    seen.fill(true);
    if (block >= task.whole_begin && block < task.whole_end && row0 + kRows <= task.rows) return;
    seen.fill(false);
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) {
        const int key = key0 + Atom::row(Atom::row_slot(i)), row = row0 + n * kAtom + Atom::col(i);
        const bool there = key < task.seq_kv & row < task.rows;
        if (there & key >= row - task.left & key <= row + task.right) bits |= 1u << 4 * i;
      }
      seen.add(n, bits);
    }
  }

  FX_DEVICE void read_bools() {
    const int col = Atom::eight_col();
    const int matrix = col / 8 * 2 + Atom::eight_row() / 8;
    ScoreBits<kRows> keep;
    keep.fill(false);
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      const uint2 x = *reinterpret_cast<const uint2*>(&rows.eight[n][matrix * 8 + col % 8]);
      keep.add(n, Atom::spread_eights(
                      [&](int j) { return ((j < 4 ? x.x : x.y) >> 8 * (j % 4) & 0xffu) != 0; }));
    }
    seen.keep(keep);
  }

  // A lane makes the numbers of eight keys of a row, see dropout_bits.
  FX_DEVICE void draw_kept(int head, int block) {
    const uint64_t seed = uniform(p.rng_state[0]), offset = uniform(p.rng_state[1]);
    const uint32_t batch_head = static_cast<uint32_t>(task.batch * p.heads_q + head);
    const uint32_t group = static_cast<uint32_t>(key0 + Atom::eight_row()) / 8;
    kept.fill(false);
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      const uint32_t query = block * kRows + n * kAtom + Atom::eight_col();
      const Philox4 bits = dropout_bits(seed, offset, batch_head, query, group);
      kept.add(n, Atom::spread_eights([&](int j) {
                 return (bits.word[j / 2] >> 16 * (j % 2) & 0xffffu) >= p.dropout_threshold;
               }));
    }
  }

  template <typename F>
  FX_DEVICE void with_form(F f) const {
    if (!p.mask.data || p.mask.dtype == DType::b8) f(ConstantForm<MaskForm::none>{});
    else if (p.mask.dtype == DType::f32) f(ConstantForm<MaskForm::single>{});
    else f(ConstantForm<MaskForm::same>{});
  }
  // Of a tensor of the mask's shape: this lane's first element, and how far from there is that of
  // register i of atom n.
  template <typename E>
  FX_DEVICE E* first_element(E* data, int64_t batch_stride, int64_t head_stride, int64_t q_stride,
                             int64_t kv_stride) const {
    return data + task.batch * batch_stride + head * head_stride +
           (row0 + Atom::col(0)) * q_stride + (key0 + Atom::row(0)) * kv_stride;
  }
  FX_DEVICE static int from_first(int64_t q_stride, int64_t kv_stride, int n, int i) {
    const int row = n * kAtom + i / 4 * 8 + i % 2, key = Atom::row_slot(i) * 8;
    return row * static_cast<int>(q_stride) + key * static_cast<int>(kv_stride);
  }

  // This lane's elements of the mask, of atom n.
  template <MaskForm kMask>
  FX_DEVICE void read_mask(float (&x)[Atom::kAccRegs], int n) const {
    if constexpr (kMask == MaskForm::same) {
      uint32_t pair[Atom::kAccRegs / 2];
      ptx::ldmatrix<true>(pair, ptx::shared_address(&rows.eight[n][lane_id()]));
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) x[i] = to_float(reinterpret_cast<const T*>(pair)[i]);
    } else {
      const MaskView& mask = p.mask;
      const float* first = first_element(static_cast<const float*>(mask.data), mask.batch_stride,
                                         mask.head_stride, mask.q_stride, mask.kv_stride);
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i)
        x[i] = seen.at(n, i) ? first[from_first(mask.q_stride, mask.kv_stride, n, i)] : 0.f;
    }
  }

  // Two neighbouring rows' of atom n.
  FX_DEVICE static float2 stats_of(const float* of_row, int n, int half) {
    return *reinterpret_cast<const float2*>(of_row + n * kAtom + Atom::col(4 * half));
  }

  // x * scale, of atom n, is the score to base 2 before ALiBi.
  template <MaskForm kMask>
  FX_DEVICE Acc weights_of(const Acc& x, float scale, int n, const Stats& stats) const {
    float mask[Atom::kAccRegs];
    if constexpr (kMask != MaskForm::none) read_mask<kMask>(mask, n);
    Acc w;
#pragma unroll
    for (int i = 0; i < Atom::kAccRegs; ++i) {
      const float2 lse = stats_of(stats.lse, n, i / 4);
      const int step = n * kAtom + i / 4 * 8 + i % 2 - Atom::row_slot(i) * 8;
      float y = fmaf(x.reg[i], scale, i % 2 ? -lse.y : -lse.x);
      y = fmaf(-slope, fabsf(here + static_cast<float>(step)), y);
      if constexpr (kMask != MaskForm::none)
        y = mask[i] == -INFINITY ? mask[i] : fmaf(mask[i], kLog2e, y);
      w.reg[i] = seen.at(n, i) ? fast_exp2(y) : 0.f;
    }
    return w;
  }

  template <bool kSoftcap, MaskForm kMask>
  FX_DEVICE void weights_and_factors(const Scores& s, Weights& weights, Weights& factors,
                                     const Stats& stats) const {
    const float scale = static_cast<float>(p.scale), softcap = static_cast<float>(p.softcap);
    const float inside = kSoftcap ? scale * fast_reciprocal(softcap) : 0.f;
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      Acc x = s.atom[0][n];
      if constexpr (kSoftcap)
        for (float& y : x.reg) y = fast_tanh(y * inside);
      Acc w = weights_of<kMask>(x, (kSoftcap ? softcap : scale) * kLog2e, n, stats), factor = w;
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) {
        if constexpr (kSoftcap) factor.reg[i] *= 1.f - x.reg[i] * x.reg[i];
        if constexpr (Config::kDropout) {
          const bool keep = kept.at(n, i);
          factor.reg[i] = keep ? factor.reg[i] : -factor.reg[i];
          w.reg[i] = keep ? w.reg[i] : 0.f;
        }
      }
      weights.atom[0][n] = Atom::to_operand(w), factors.atom[0][n] = Atom::to_operand(factor);
    }
  }

  // kSoftcap: s is tanh, otherwise the weights.
  template <bool kSoftcap, MaskForm kMask, bool kDmask>
  FX_DEVICE void gradients(const Scores& s, const Scores& dp, Weights& weights, Weights& ds,
                           const Stats& stats) const {
    const float softcap = static_cast<float>(p.softcap) * kLog2e;
    const float factor = 65536.f / (65536.f - static_cast<float>(p.dropout_threshold));
    float* dmask = nullptr;
    if constexpr (kDmask)
      dmask = first_element(static_cast<float*>(p.dmask), p.dmask_batch_stride, p.dmask_head_stride,
                            p.dmask_q_stride, p.dmask_kv_stride);
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      Acc w = s.atom[0][n], grad = dp.atom[0][n];
      if constexpr (kSoftcap) w = weights_of<kMask>(w, softcap, n, stats);
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) {
        const float2 delta = stats_of(stats.delta, n, i / 4);
        const bool keep = !Config::kDropout || kept.at(n, i);
        float& g = grad.reg[i];
        if constexpr (Config::kDropout) g = keep ? g * factor : 0.f;
        g = w.reg[i] * (g - (i % 2 ? delta.y : delta.x));
        if constexpr (kDmask)
          add_where(w.reg[i], dmask + from_first(p.dmask_q_stride, p.dmask_kv_stride, n, i), g);
        if constexpr (kSoftcap) g *= 1.f - s.atom[0][n].reg[i] * s.atom[0][n].reg[i];
        if constexpr (Config::kDropout) w.reg[i] = keep ? w.reg[i] : 0.f;
      }
      weights.atom[0][n] = Atom::to_operand(w), ds.atom[0][n] = Atom::to_operand(grad);
    }
  }
};

// Of kernels without options.
struct NoBwdScores {
  struct MaskRows {};
  template <typename Rows>
  FX_DEVICE NoBwdScores(const AttnBwdParams&, const BwdTask&, Rows&, int) {}
};

}  // namespace flash_ext::sm90
