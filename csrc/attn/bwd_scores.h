// From transposed products, [keys, rows], to weights and their gradients.
#pragma once
#include "../tile/atomic.h"
#include "../tile/reg_tile.h"
#include "bwd_task.h"
#include "online_softmax.h"
#include "philox.h"
#include "scores.h"

namespace flash_ext {

// What the options need to know of a row.
struct RowOptions {
  float slope;
  int query;
  uint32_t batch_head;
  int64_t mask, dmask;  // element offsets of the row
};

// What a block of query rows is told to all warps, in shared memory.
template <bool kGeneral, int kRows>
struct RowFacts;

template <int kRows>
struct RowFacts<false, kRows> {
  float lse[kRows], delta[kRows];
  int key_begin[kRows], key_end[kRows];  // the keys it sees
};

template <int kRows>
struct RowFacts<true, kRows> : RowFacts<false, kRows> {
  RowOptions options[kRows];
};

// Thread t fetches row t of a block, and puts it in shared memory later.
template <bool kGeneral, int kRows>
class RowFactsLoader {
 public:
  FX_DEVICE RowFactsLoader(const BwdArgs& args, const BwdTask& task) : args(args), task(task) {}

  FX_DEVICE void fetch(int block) {
    row = block * kRows + static_cast<int>(threadIdx.x);
    stats = {INFINITY, 0.f};
    if (threadIdx.x < kRows && row < task.rows) stats = args.stats[task.first_row + row];
  }
  FX_DEVICE void put(RowFacts<kGeneral, kRows>& facts) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kRows) return;
    const int query = task.query(row);
    facts.lse[i] = stats.lse, facts.delta[i] = stats.delta;
    facts.key_begin[i] = query - task.left;
    facts.key_end[i] = std::min(query + task.right + 1, task.seq_kv);
    if constexpr (kGeneral) {
      const AttnBwdParams& p = args.params;
      const int there = std::min(row, task.rows - 1), head = task.head_of(there);
      const int64_t b = task.batch, q = task.query(there);
      RowOptions& o = facts.options[i];
      o.query = static_cast<int>(q);
      o.batch_head = static_cast<uint32_t>(b * p.heads_q + head);
      if (p.alibi_slopes)
        o.slope = static_cast<const float*>(p.alibi_slopes)[b * p.alibi_batch_stride + head];
      o.mask = b * p.mask.batch_stride + head * p.mask.head_stride + q * p.mask.q_stride;
      o.dmask = b * p.dmask_batch_stride + head * p.dmask_head_stride + q * p.dmask_q_stride;
    }
  }

 private:
  const BwdArgs& args;
  const BwdTask& task;
  int row = 0;
  RowStats stats{};
};

// A warp's [keys, rows] tile on its way from k q^T to the weights, and from v grad_o^T to ds, the
// gradient of the scaled products. Rows count from `first` of the block, keys from `key`.
template <typename Config>
class BwdScores {
 public:
  using Tile = typename Config::Scores;
  using Facts = RowFacts<Config::kGeneral, Config::kBlockQ>;

  FX_DEVICE BwdScores(const BwdArgs& args, const BwdTask& task, const Facts& facts, int warp_key,
                      int first)
      : p(args.params), task(task), facts(facts), key0(task.key0 + warp_key), first(first) {}

  // s = k q^T becomes softmax(scores); partly: some of its keys may be hidden from some rows.
  FX_DEVICE void weights(Tile& s, bool partly) {
    float scale = static_cast<float>(p.scale) * kLog2e;
    if constexpr (Config::kGeneral) apply_options(s), scale = kLog2e;
    s.for_each([&](float& x, int, int, int col) {
      x = fast_exp2(fmaf(x, scale, -facts.lse[first + col]));
    });
    if (partly)
      s.for_each([&](float& x, int m, int slot, int col) {
        const int key = key0 + s.row(m, slot);
        const bool seen = key >= facts.key_begin[first + col] & key < facts.key_end[first + col];
        x = seen ? x : 0.f;
      });
  }

  // What v grad_o^T is added to.
  FX_DEVICE void start_gradient(Tile& ds) const {
    ds.for_each([&](float& x, int, int, int col) {
      x = Config::kGeneral ? 0.f : -facts.delta[first + col];
    });
  }

  // ds so far becomes the gradient; s, the weights, loses what dropout drops.
  FX_DEVICE void gradient(Tile& ds, Tile& s) {
    if constexpr (Config::kGeneral) {
      if (p.dropout_threshold) apply_dropout(ds, s);
      else
        ds.for_each(s, [&](float& x, float& w, int, int, int col) {
          x = w * (x - facts.delta[first + col]);
        });
      if (p.dmask) add_dmask(ds);
      if (p.softcap > 0) ds.for_each(slope, [&](float& x, float& y, int, int, int) { x *= y; });
    } else {
      ds.for_each(s, [](float& x, float& w, int, int, int) { x *= w; });
    }
  }

 private:
  FX_DEVICE const RowOptions& options(int col) const { return facts.options[first + col]; }

  FX_DEVICE void apply_options(Tile& s) {
    const float softcap = static_cast<float>(p.softcap);
    if (softcap > 0.f) {
      const float inside = static_cast<float>(p.scale / p.softcap);
      s.for_each(slope, [&](float& x, float& y, int, int, int) {
        const float t = tanhf(x * inside);
        x = softcap * t, y = 1.f - t * t;
      });
    } else {
      const float scale = static_cast<float>(p.scale);
      s.for_each([&](float& x, int, int, int) { x *= scale; });
    }
    if (p.alibi_slopes) {
      const int diagonal = task.seq_kv - task.rows / task.pack.by - key0;
      s.for_each([&](float& x, int m, int slot, int col) {
        const int distance = options(col).query + diagonal - s.row(m, slot);
        x -= options(col).slope * fabsf(static_cast<float>(distance));
      });
    }
    if (p.mask.data)
      s.for_each([&](float& x, int m, int slot, int col) {
        const int key = std::min(key0 + s.row(m, slot), task.seq_kv - 1);
        const float y = mask_value(p.mask, options(col).mask + key * p.mask.kv_stride);
        x = y == -INFINITY ? y : x + y;
      });
  }

  FX_DEVICE void apply_dropout(Tile& ds, Tile& s) const {
    const uint64_t seed = p.rng_state[0], offset = p.rng_state[1];
    const float factor = 65536.f / (65536.f - p.dropout_threshold);
    ds.for_each(s, [&](float& x, float& w, int m, int slot, int col) {
      const uint32_t key = static_cast<uint32_t>(key0 + s.row(m, slot));
      const RowOptions& row = options(col);
      const Philox4 bits = dropout_bits(seed, offset, row.batch_head, row.query, key / 8);
      const bool drop = dropout_number(bits, key) < p.dropout_threshold;
      x = w * ((drop ? 0.f : x * factor) - facts.delta[first + col]);
      if (drop) w = 0.f;
    });
  }

  FX_DEVICE void add_dmask(const Tile& ds) const {
    ds.for_each([&](const float& x, int m, int slot, int col) {
      const int key = key0 + ds.row(m, slot);
      // Zero: what is hidden, and rows that are not there; with a NaN in grad_o it may be NaN.
      if (x != 0.f && key < task.seq_kv)
        add_to(static_cast<float*>(p.dmask) + options(col).dmask + key * p.dmask_kv_stride, x);
    });
  }

  const AttnBwdParams& p;
  const BwdTask& task;
  const Facts& facts;
  int key0, first;
  Tile slope;  // of softcap * tanh
};

}  // namespace flash_ext
