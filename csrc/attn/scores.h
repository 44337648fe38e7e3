// From q k^T to scores in the general variant: softcap, ALiBi, mask tensors; and dropout.
#pragma once
#include "../tile/reg_tile.h"
#include "fwd_task.h"
#include "online_softmax.h"
#include "philox.h"

namespace flash_ext {

// An element of a mask tensor as what is added to a score.
FX_DEVICE float mask_value(const MaskView& mask, int64_t offset) {
  switch (mask.dtype) {
    case DType::b8: return static_cast<const uint8_t*>(mask.data)[offset] ? 0.f : -INFINITY;
    case DType::f16: return to_float(static_cast<const half_t*>(mask.data)[offset]);
    case DType::bf16: return to_float(static_cast<const bf16_t*>(mask.data)[offset]);
    case DType::f64: return to_float(static_cast<const double*>(mask.data)[offset]);
    default: return static_cast<const float*>(mask.data)[offset];
  }
}

// s = q k^T becomes scores to base 2, of the rows from row0 and the keys from kv0 on. Keys that are
// not there are left to the band mask.
template <typename T, int kRows, int kCols>
FX_DEVICE void apply_options(AccTile<T, kRows, kCols>& s, const AttnParams& p, const FwdTask& task,
                             int row0, int kv0) {
  const float scale = static_cast<float>(p.scale), softcap = static_cast<float>(p.softcap);
  if (softcap > 0.f) {
    const float inside = static_cast<float>(p.scale / p.softcap);
    s.for_each([&](float& x, int, int, int) { x = softcap * tanhf(x * inside); });
  } else {
    s.for_each([&](float& x, int, int, int) { x *= scale; });
  }

  const auto row_of = [&](int m, int slot) {  // rows that are not there repeat the last one
    return std::min(row0 + s.row(m, slot), task.rows - 1);
  };
  if (p.alibi_slopes) {
    RowVec<T, kRows> slope, here;  // here: the key at distance 0
    slope.for_each([&](float& x, int m, int r) {
      const int row = row_of(m, r);
      x = static_cast<const float*>(
          p.alibi_slopes)[task.batch * p.alibi_batch_stride + task.head_of(row)];
      here.v[m][r] =
          static_cast<float>(task.query(row) + task.seq_kv - task.rows / task.pack.by - kv0);
    });
    s.for_each([&](float& x, int m, int r, int col) {
      x -= slope.v[m][r] * fabsf(here.v[m][r] - static_cast<float>(col));
    });
  }
  if (p.mask.data) {
    RowVec<T, kRows, int64_t> offset;
    offset.for_each([&](int64_t& x, int m, int r) {
      const int row = row_of(m, r);
      x = task.batch * p.mask.batch_stride + task.head_of(row) * p.mask.head_stride +
          task.query(row) * p.mask.q_stride;
    });
    s.for_each([&](float& x, int m, int r, int col) {
      const int key = std::min(kv0 + col, task.seq_kv - 1);
      const float y = mask_value(p.mask, offset.v[m][r] + key * p.mask.kv_stride);
      x = y == -INFINITY ? y : x + y;
    });
  }
  s.for_each([&](float& x, int, int, int) { x *= kLog2e; });
}

// The 16 bits of a key, of those of eight neighbours; written so that `bits` stays in registers.
FX_DEVICE uint32_t dropout_number(const Philox4& bits, uint32_t key) {
  const uint32_t low = key & 2 ? bits.word[1] : bits.word[0];
  const uint32_t high = key & 2 ? bits.word[3] : bits.word[2];
  return ((key & 4 ? high : low) >> (16 * (key & 1))) & 0xffffu;
}

// Sets the weights that dropout drops to zero.
template <typename T, int kRows, int kCols>
FX_DEVICE void apply_dropout(AccTile<T, kRows, kCols>& s, const AttnParams& p, const FwdTask& task,
                             int row0, int kv0) {
  const uint64_t seed = p.rng_state[0], offset = p.rng_state[1];
  Philox4 bits{};
  int last_group = -1, last_row = -1;
  s.for_each([&](float& x, int m, int slot, int col) {
    const int row = row0 + s.row(m, slot), key = kv0 + col;
    if (key / 8 != last_group || row != last_row) {
      last_group = key / 8, last_row = row;
      const uint32_t batch_head = static_cast<uint32_t>(task.batch * p.heads_q + task.head_of(row));
      bits = dropout_bits(seed, offset, batch_head, task.query(row), last_group);
    }
    if (dropout_number(bits, key) < p.dropout_threshold) x = 0.f;
  });
}

}  // namespace flash_ext
