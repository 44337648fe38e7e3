// From q k^T to scores in the general variant: softcap, ALiBi, mask tensors; and dropout.
#pragma once
#include "../tile/reg_tile.h"
#include "fwd_task.h"
#include "online_softmax.h"
#include "philox.h"

namespace flash_ext {

// An element of a mask tensor as what is added to a score.
template <typename E>
FX_DEVICE float mask_value(E x) {
  if constexpr (std::is_same_v<E, uint8_t>) return x ? 0.f : -INFINITY;
  else return to_float(x);
}

// f(the mask's elements, as what they are)
template <typename F>
FX_DEVICE auto with_elements(const MaskView& mask, F f) {
  switch (mask.dtype) {
    case DType::b8: return f(static_cast<const uint8_t*>(mask.data));
    case DType::f16: return f(static_cast<const half_t*>(mask.data));
    case DType::bf16: return f(static_cast<const bf16_t*>(mask.data));
    case DType::f64: return f(static_cast<const double*>(mask.data));
    default: return f(static_cast<const float*>(mask.data));
  }
}

FX_DEVICE float mask_value(const MaskView& mask, int64_t offset) {
  return with_elements(mask, [&](const auto* elements) { return mask_value(elements[offset]); });
}

// The mask tensor of a block of scores. Where two neighbouring keys can be read at once, they are
// fetched before the scores are computed, which hides the wait for them.
template <typename T, int kRows, int kCols>
struct MaskBlock {
  using Scores = AccTile<T, kRows, kCols>;
  // float32's tiles have no registers to spare.
  static constexpr bool kPairs = MmaAtom<T>::kColsInPairs && !std::is_same_v<T, float>;
  const AttnParams& p;
  RowVec<T, kRows, int64_t> row;  // where a row's key 0 is
  bool in_pairs;
  uint32_t pair[kPairs ? Scores::kPairs : 1];  // as they lie in memory

  FX_DEVICE MaskBlock(const AttnParams& p, const RowGroup& task, int row0) : p(p) {
    const MaskView& mask = p.mask;
    const bool bytes = mask.dtype == DType::b8;
    const int64_t strides = mask.batch_stride | mask.head_stride | mask.q_stride | p.seq_kv;
    in_pairs = (bytes || mask.dtype == DType::f16 || mask.dtype == DType::bf16) &&
               mask.kv_stride == 1 && strides % 2 == 0 &&
               reinterpret_cast<uintptr_t>(mask.data) % (bytes ? 2 : 4) == 0;
    row.for_each([&](int64_t& x, int m, int slot) {  // rows that are not there repeat the last one
      const int r = std::min(row0 + Scores::row(m, slot), task.rows - 1);
      x = task.batch * mask.batch_stride + task.head_of(r) * mask.head_stride +
          task.query(r) * mask.q_stride;
    });
  }

  // Of the keys from kv0 on. Those that are not there are left to the band mask; they repeat the
  // last ones.
  FX_DEVICE void fetch(int kv0) {
    if constexpr (kPairs) {
      if (!in_pairs) return;
      const int last = static_cast<int>(p.seq_kv) - 2 - kv0;
      const auto fetch_all = [&](const auto* pairs) {
        Scores::for_each_pair([&](int j, int m, int slot, int col) {
          pair[j] = pairs[(row.v[m][slot] + kv0 + std::min(col, last)) / 2];
        });
      };
      if (p.mask.dtype == DType::b8) fetch_all(static_cast<const uint16_t*>(p.mask.data));
      else fetch_all(static_cast<const uint32_t*>(p.mask.data));
    }
  }

  FX_DEVICE void add_to(Scores& s, int kv0) const {
    // What is hidden is so whatever it was, NaN too.
    const auto add = [](float& x, auto element) {
      const float y = mask_value(element);
      if constexpr (std::is_same_v<decltype(element), uint8_t>) x = element ? x : y;
      else x = y == -INFINITY ? y : x + y;
    };
    with_elements(p.mask, [&](const auto* elements) {
      using E = std::remove_cvref_t<decltype(*elements)>;
      if constexpr (kPairs && sizeof(E) <= 2) {
        if (in_pairs) {
          Scores::for_each_pair([&](int j, int, int, int) {
            const E* two = reinterpret_cast<const E*>(&pair[j]);
            for (int i = 0; i < 2; ++i) add(s.pair(j)[i], two[i]);
          });
          return;
        }
      }
      const int last = static_cast<int>(p.seq_kv) - 1 - kv0;
      s.for_each([&](float& x, int m, int slot, int col) {
        const int64_t key = kv0 + std::min(col, last);
        add(x, elements[row.v[m][slot] + key * p.mask.kv_stride]);
      });
    });
  }
};

// Of the variants without mask tensors.
struct NoMask {
  FX_DEVICE NoMask(const AttnParams&, const RowGroup&, int) {}
};

// s = q k^T becomes scores under softcap.
template <typename T, int kRows, int kCols>
FX_DEVICE void scale_scores(AccTile<T, kRows, kCols>& s, const AttnParams& p) {
  const float scale = static_cast<float>(p.scale), softcap = static_cast<float>(p.softcap);
  if (softcap > 0.f) {
    const float inside = static_cast<float>(p.scale / p.softcap);
    s.for_each([&](float& x, int, int, int) {
      x = softcap * (std::is_same_v<T, float> ? tanhf(x * inside) : fast_tanh(x * inside));
    });
  } else {
    s.for_each([&](float& x, int, int, int) { x *= scale; });
  }
}

// Adds ALiBi to scores, of the rows from row0 and the keys from kv0 on.
template <typename T, int kRows, int kCols>
FX_DEVICE void add_alibi(AccTile<T, kRows, kCols>& s, const AttnParams& p, const RowGroup& task,
                         int row0, int kv0) {
  if (!p.alibi_slopes) return;
  RowVec<T, kRows> slope, here;  // here: from this lane's first key to the one at distance 0
  slope.for_each([&](float& x, int m, int r) {
    const int row = std::min(row0 + s.row(m, r), task.rows - 1);  // as MaskBlock's
    x = static_cast<const float*>(
        p.alibi_slopes)[task.batch * p.alibi_batch_stride + task.head_of(row)];
    here.v[m][r] = static_cast<float>(task.query(row) + task.seq_kv - task.rows / task.pack.by -
                                      kv0 - s.first_col());
  });
  s.for_each([&](float& x, int m, int r, int col) {
    x -= slope.v[m][r] * fabsf(here.v[m][r] - static_cast<float>(col - s.first_col()));
  });
}

// Both.
template <typename T, int kRows, int kCols>
FX_DEVICE void apply_options(AccTile<T, kRows, kCols>& s, const AttnParams& p, const RowGroup& task,
                             int row0, int kv0) {
  scale_scores(s, p);
  add_alibi(s, p, task, row0, kv0);
}

// The 16 bits of a key, of those of eight neighbours; written so that `bits` stays in registers.
FX_DEVICE uint32_t dropout_number(const Philox4& bits, uint32_t key) {
  const uint32_t low = key & 2 ? bits.word[1] : bits.word[0];
  const uint32_t high = key & 2 ? bits.word[3] : bits.word[2];
  return ((key & 4 ? high : low) >> (16 * (key & 1))) & 0xffffu;
}

// Sets the weights that dropout drops to zero.
template <typename T>
class Dropout {
  using Atom = MmaAtom<T>;

 public:
  FX_DEVICE Dropout(const AttnParams& p, const RowGroup& task)
      : p(p), task(task), seed(p.rng_state[0]), offset(p.rng_state[1]) {}

  // Of the atom that starts at this row and key.
  FX_DEVICE void apply(typename Atom::Acc& weights, int row0, int key0) const {
    if constexpr (Atom::kQuads) {
      // Four lanes share two rows of two groups of eight keys: each makes the numbers of one of the
      // four, and hands them on.
      const int lane = lane_id() % 4;
      Philox4 bits = numbers(row0 + Atom::row(lane % 2), key0 / 8 + lane / 2);
      Atom::transpose_lanes(bits.word);
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i)
        if (((bits.word[i / 2] >> 16 * (i % 2)) & 0xffffu) < p.dropout_threshold)
          weights.reg[i] = 0.f;
    } else {
      Philox4 bits{};
      int last_group = -1, last_row = -1;
#pragma unroll
      for (int i = 0; i < Atom::kAccRegs; ++i) {
        const int row = row0 + Atom::row(Atom::row_slot(i)), key = key0 + Atom::col(i);
        if (key / 8 != last_group || row != last_row) {
          last_group = key / 8, last_row = row;
          bits = numbers(row, last_group);
        }
        if (dropout_number(bits, key) < p.dropout_threshold) weights.reg[i] = 0.f;
      }
    }
  }
  template <int kRows, int kCols>
  FX_DEVICE void apply(AccTile<T, kRows, kCols>& weights, int row0, int key0) const {
#pragma unroll
    for (int m = 0; m < kRows / kAtom; ++m)
#pragma unroll
      for (int n = 0; n < kCols / kAtom; ++n)
        apply(weights.atom[m][n], row0 + m * kAtom, key0 + n * kAtom);
  }

 private:
  const AttnParams& p;
  const RowGroup& task;
  uint64_t seed, offset;

  FX_DEVICE Philox4 numbers(int row, int group) const {
    const uint32_t batch_head = static_cast<uint32_t>(task.batch * p.heads_q + task.head_of(row));
    return dropout_bits(seed, offset, batch_head, task.query(row), group);
  }
};

}  // namespace flash_ext
