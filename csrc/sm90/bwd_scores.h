// Options in the Hopper backward: from transposed products, [keys, rows], to weights and their gradients
// under softcap, ALiBi, mask tensors and dropout, as attn/bwd_scores.h has them.
#pragma once
#include "../attn/bwd_task.h"
#include "../attn/scores.h"
#include "../tile/async_copy.h"
#include "../tile/atomic.h"
#include "bwd_args.h"

namespace flash_ext::sm90 {

// A bit for each score that a lane holds of a warp's [16, kCols].
template <int kCols>
struct ScoreBits {
  uint32_t word[kCols / 64];  // of register i of atom n, bit 4 i + n % 4

  FX_DEVICE void fill(bool x) {
    for (uint32_t& w : word) w = x ? ~0u : 0;
  }
  // Of atom n, in which all are still zero; bit 4 i is that of register i.
  FX_DEVICE void add(int n, uint32_t bits) { word[n / 4] |= bits << n % 4; }
  FX_DEVICE void keep(const ScoreBits& other) {
#pragma unroll
    for (int i = 0; i < kCols / 64; ++i) word[i] &= other.word[i];
  }
  FX_DEVICE bool at(int n, int i) const { return word[n / 4] & 1u << (4 * i + n % 4); }
};

// How a block's mask comes to its scores.
enum class MaskForm {
  none,    // also a bool one: that is a matter of bits
  halves,  // 16 bits an element, through shared memory
  others,  // wider ones, each lane its own from where they are
};

// Of a warp's 16 keys from key0 on. What does not depend on products is done while they run: a block
// ahead, a mask's elements of up to 16 bits are copied to shared memory, eight keys of a row together,
// where they are found transposed; bool ones become bits, as do the weights that dropout drops.
template <typename Config>
class BwdScores {
  using T = typename Config::T;
  using Atom = MmaAtom<T>;
  using Scores = typename Config::Scores;
  using Weights = typename Config::Weights;
  using Stats = typename Config::Stats;
  static constexpr int kRows = Config::kBlockQ, kAtoms = kRows / kAtom;

 public:
  struct MaskRows {
    uint4 eight[kAtoms][kWarpSize];  // keys, of four 8x8 matrices an atom
  };

  FX_DEVICE BwdScores(const AttnBwdParams& p, const BwdTask& task, MaskRows& rows, int key0)
      : p(p), task(task), rows(rows), key0(key0) {}

  // Starts to copy the mask of the next block.
  FX_DEVICE void fetch(int head, int block) {
    if (!p.mask.data) return;
    __syncwarp();  // nobody reads the last block's any more
    with_elements(p.mask, [&](const auto* elements) {
      using E = std::remove_cvref_t<decltype(*elements)>;
      if constexpr (sizeof(E) <= 2) {
        const MaskView& mask = p.mask;
        const int64_t strides = mask.batch_stride | mask.head_stride | mask.q_stride | p.seq_kv;
        const bool in_eights = mask.kv_stride == 1 && strides % 8 == 0 &&
                               reinterpret_cast<uintptr_t>(mask.data) % (8 * sizeof(E)) == 0;
        const int lane = lane_id(), key = key0 + lane / 8 % 2 * 8;
        const int last = static_cast<int>(p.seq_kv) - 1;  // what follows is not seen
        elements += first_of(mask.batch_stride, mask.head_stride, head);
#pragma unroll
        for (int n = 0; n < kAtoms; ++n) {
          const int row = block * kRows + 16 * n + lane / 16 * 8 + lane % 8;
          const E* from = elements + std::min(row, task.rows - 1) * mask.q_stride;
          E* to = reinterpret_cast<E*>(&rows.eight[n][lane]);
          if (in_eights) {
            copy_eight(to, from + std::min(key, last - 7));
          } else {
            for (int i = 0; i < 8; ++i) to[i] = from[std::min(key + i, last) * mask.kv_stride];
          }
        }
        copy_commit();
      }
    });
  }

  // What can be known of a block before its products.
  FX_DEVICE void prepare(int head, int block) {
    batch_head = static_cast<uint32_t>(task.batch * p.heads_q + task.head + head);
    row0 = block * kRows;
    slope = 0.f;
    if (p.alibi_slopes)
      slope = kLog2e * static_cast<const float*>(
                           p.alibi_slopes)[task.batch * p.alibi_batch_stride + task.head + head];
    see(block);
    if (p.mask.data) {
      copy_wait<0>();
      __syncwarp();  // all of the mask is there
      if (p.mask.dtype == DType::b8) read_bools();
    }
    if constexpr (Config::kDropout) draw();
  }

  // s = k q^T and dp = v grad_o^T become weights, without the dropped ones, and the gradients of scores
  // before their scale.
  FX_DEVICE void weigh(const Scores& s, const Scores& dp, Weights& weights, Weights& ds,
                       const Stats& stats) const {
    using enum MaskForm;
    const auto with_mask = [&](auto softcap) {
      constexpr bool kSoftcap = decltype(softcap)::value;
      if (!p.mask.data || p.mask.dtype == DType::b8) all<kSoftcap, none>(s, dp, weights, ds, stats);
      else if (p.mask.dtype == DType::f16 || p.mask.dtype == DType::bf16)
        all<kSoftcap, halves>(s, dp, weights, ds, stats);
      else all<kSoftcap, others>(s, dp, weights, ds, stats);
    };
    if (p.softcap > 0) with_mask(std::true_type{});
    else with_mask(std::false_type{});
  }

 private:
  const AttnBwdParams& p;
  const BwdTask& task;
  MaskRows& rows;
  const int key0;
  int row0;             // of the block
  uint32_t batch_head;  // of its rows
  float slope;          // to base 2
  ScoreBits<kRows> seen, kept;

  FX_DEVICE int64_t first_of(int64_t batch_stride, int64_t head_stride, int head) const {
    return task.batch * batch_stride + (task.head + head) * head_stride;
  }
  FX_DEVICE int head() const {
    return static_cast<int>(batch_head - task.batch * p.heads_q) - task.head;
  }

  template <typename E>
  FX_DEVICE static void copy_eight(E* to, const E* from) {
    if constexpr (sizeof(E) == 2) copy_async(to, from, 16);
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(ptx::shared_address(to)),
                   "l"(from)
                   : "memory");
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

  // Which weights dropout keeps. A lane makes the numbers of eight keys of a row, see dropout_bits.
  FX_DEVICE void draw() {
    const uint64_t seed = p.rng_state[0], offset = p.rng_state[1];
    const uint32_t group = static_cast<uint32_t>(key0 + Atom::eight_row()) / 8;
    kept.fill(false);
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      const uint32_t query = row0 + n * kAtom + Atom::eight_col();
      const Philox4 bits = dropout_bits(seed, offset, batch_head, query, group);
      kept.add(n, Atom::spread_eights([&](int j) {
                 return (bits.word[j / 2] >> 16 * (j % 2) & 0xffffu) >= p.dropout_threshold;
               }));
    }
  }

  // This lane's elements of a wide mask, of atom n.
  FX_DEVICE void read_others(float (&x)[8], int n) const {
    with_elements(p.mask, [&](const auto* elements) {
      if constexpr (sizeof(*elements) > 2) {
        const MaskView& mask = p.mask;
        elements += first_of(mask.batch_stride, mask.head_stride, head());
#pragma unroll
        for (int i = 0; i < Atom::kAccRegs; ++i) {
          const int row = std::min(row0 + n * kAtom + Atom::col(i), task.rows - 1);
          const int key = std::min(key0 + Atom::row(Atom::row_slot(i)), task.seq_kv - 1);
          x[i] = to_float(elements[row * mask.q_stride + key * mask.kv_stride]);
        }
      }
    });
  }
  template <typename E>
  FX_DEVICE void read_halves(float (&x)[8], int n) const {
    uint32_t pair[4];
    ptx::ldmatrix<true>(pair, ptx::shared_address(&rows.eight[n][lane_id()]));
#pragma unroll
    for (int i = 0; i < Atom::kAccRegs; ++i) x[i] = to_float(reinterpret_cast<const E*>(pair)[i]);
  }
  template <MaskForm kMask>
  FX_DEVICE void read_mask(float (&x)[8], int n) const {
    if constexpr (kMask == MaskForm::others) read_others(x, n);
    else if (p.mask.dtype == DType::f16) read_halves<half_t>(x, n);
    else read_halves<bf16_t>(x, n);
  }

  // Everything that happens to a score, one after the other, so that it need not be kept in between.
  template <bool kSoftcap, MaskForm kMask>
  FX_DEVICE void all(const Scores& s, const Scores& dp, Weights& weights, Weights& ds,
                     const Stats& stats) const {
    const float softcap = static_cast<float>(p.softcap) * kLog2e;
    const float scale = static_cast<float>(p.scale) *
                        (kSoftcap ? fast_reciprocal(static_cast<float>(p.softcap)) : kLog2e);
    const float factor =
        Config::kDropout ? 65536.f / (65536.f - static_cast<float>(p.dropout_threshold)) : 1.f;
    // From this lane's first key to the one at distance 0 of its first row.
    const float here =
        static_cast<float>(row0 + Atom::col(0) + task.seq_kv - task.rows - key0 - Atom::row(0));
    float* dmask = nullptr;
    if constexpr (kMask != MaskForm::none)
      if (p.dmask)
        dmask = static_cast<float*>(p.dmask) +
                first_of(p.dmask_batch_stride, p.dmask_head_stride, head()) +
                (row0 + Atom::col(0)) * p.dmask_q_stride +
                (key0 + Atom::row(0)) * p.dmask_kv_stride;
#pragma unroll
    for (int n = 0; n < kAtoms; ++n) {
      float mask[8];
      if constexpr (kMask != MaskForm::none) read_mask<kMask>(mask, n);
      typename Atom::Acc w, g;
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) {
        const int col = n * kAtom + Atom::col(i);
        const int next = n * kAtom + i / 4 * 8 + i % 2;  // from this lane's first column
        const float far = fabsf(here + static_cast<float>(next - Atom::row_slot(i) * 8));
        const float x = s.atom[0][n].reg[i] * scale, t = kSoftcap ? fast_tanh(x) : 0.f;
        float score = kSoftcap ? softcap * t : x;
        score = fmaf(-slope, far, score);
        if constexpr (kMask != MaskForm::none)
          score = mask[i] == -INFINITY ? mask[i] : fmaf(mask[i], kLog2e, score);
        const float weight = seen.at(n, i) ? fast_exp2(score - stats.lse[col]) : 0.f;
        float grad = dp.atom[0][n].reg[i];
        w.reg[i] = weight;
        if constexpr (Config::kDropout) {
          const bool keep = kept.at(n, i);
          grad = keep ? grad * factor : 0.f;
          w.reg[i] = keep ? weight : 0.f;
        }
        grad = weight * (grad - stats.delta[col]);
        if constexpr (kMask != MaskForm::none)
          if (dmask && weight != 0.f)
            add_to(dmask + next * p.dmask_q_stride + Atom::row_slot(i) * 8 * p.dmask_kv_stride,
                   grad);
        g.reg[i] = kSoftcap ? grad * (1.f - t * t) : grad;
      }
      weights.atom[0][n] = Atom::to_operand(w), ds.atom[0][n] = Atom::to_operand(g);
    }
  }
};

// Of kernels without options.
struct NoBwdScores {
  struct MaskRows {};
  FX_DEVICE NoBwdScores(const AttnBwdParams&, const BwdTask&, MaskRows&, int) {}
};

}  // namespace flash_ext::sm90
