// The forward kernel. FlashAttention-2 (arXiv:2307.08691): one thread block owns a tile of query
// rows, each warp some of its rows, and K and V pass by in blocks.
#pragma once
#include "../tile/reg_tile.h"
#include "element.h"
#include "fwd_task.h"
#include "fwd_variants.h"
#include "load_tile.h"
#include "online_softmax.h"
#include "scores.h"

namespace flash_ext {

template <FwdVariant kVariant>
struct FwdConfig {
  using T = Element<kVariant.dtype>;
  static constexpr FwdTile kTile = fwd_tile(kVariant, kAmd);
  static constexpr bool kGeneral = kVariant.general;
  static constexpr int kHeadDim = kVariant.head_dim;
  static constexpr int kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kStages = kTile.stages, kRowsPerWarp = kTile.rows_per_warp();
  static constexpr int kThreads = kTile.warps * kWarpSize;  // device code only
  // AMD's compilers read the second number of __launch_bounds__ as something else.
  static constexpr int kBlocksPerSm = kAmd ? 1 : kTile.blocks_per_sm;

  using QTile = SharedTile<T, kBlockQ, kHeadDim>;
  using KvTile = SharedTile<T, kBlockKV, kHeadDim>;
  using Staging = flash_ext::Staging<kThreads, !kGeneral, kBlockKV, kHeadDim>;
  using Scores = AccTile<T, kRowsPerWarp, kBlockKV>;
  using Output = AccTile<T, kRowsPerWarp, kHeadDim>;
  using Softmax = OnlineSoftmax<T, kRowsPerWarp>;
  using QOperand = std::conditional_t<kTile.q_in_regs, OperandTile<T, kRowsPerWarp, kHeadDim>,
                                      SharedOperand<T, QTile>>;
};

// Copies blocks of one KV head's keys or values. With staging, load starts it and finish ends it.
template <typename Config>
struct KvLoader {
  using T = typename Config::T;
  const T* base;
  int64_t stride;
  int rows, cols;
  bool chunks;
  float* staging;  // where the tile has one

  FX_DEVICE KvLoader(const TensorView& t, const FwdTask& task, int cols, float* staging)
      : base(static_cast<const T*>(t.data) + task.kv_offset(t)), stride(t.seq_stride),
        rows(task.seq_kv), cols(cols), chunks(in_chunks(t, sizeof(T))), staging(staging) {}

  FX_DEVICE void load(typename Config::KvTile dst, int block) const {
    const auto address = [&](int row) { return base + row * stride; };
    const int row0 = block * Config::kBlockKV;
    if constexpr (Config::kTile.staged)
      typename Config::Staging{staging}.start(address, row0, rows, cols, chunks);
    else load_tile<Config::kThreads, !Config::kGeneral>(dst, address, row0, rows, cols, chunks);
  }
  // The newest load is still on its way, and another's.
  FX_DEVICE void finish(typename Config::KvTile dst) const {
    copy_wait<1>();
    typename Config::Staging{staging}.finish(dst);
  }
};

// Hides the keys that a row does not see.
template <typename T, int kRows, int kCols>
FX_DEVICE void apply_band(AccTile<T, kRows, kCols>& s, const FwdTask& task, int row0, int kv0) {
  RowVec<T, kRows, int> begin, end;
  begin.for_each([&](int& x, int m, int r) {
    const int query = task.query(row0 + s.row(m, r)) - kv0;
    x = query - task.left;
    end.v[m][r] = std::min(query + task.right + 1, task.seq_kv - kv0);
  });
  s.for_each([&](float& x, int m, int r, int col) {
    if (col < begin.v[m][r] || col >= end.v[m][r]) x = -INFINITY;
  });
}

// Divides by the softmax's denominator and writes lse; the sink takes part unless the results of
// several blocks are merged later.
template <typename Config>
FX_DEVICE void normalise(typename Config::Output& o, typename Config::Softmax& softmax,
                         const FwdArgs& args, const FwdTask& task, int row0) {
  const AttnParams& p = args.params;
  softmax.sum.reduce_lanes([](float a, float b) { return a + b; });
  RowVec<typename Config::T, Config::kRowsPerWarp> factor;
  factor.for_each([&](float& x, int m, int r) {
    const int row = row0 + o.row(m, r);
    float top = softmax.reference.v[m][r], sum = softmax.sum.v[m][r];
    x = 1.f;
    if (p.sinks && args.splits == 1 && row < task.rows) {
      const float sink = static_cast<const float*>(p.sinks)[task.head_of(row)] * kLog2e;
      const float both = fmaxf(top, sink);
      x = fast_exp2(top - softmax.shift(both));
      sum = sum * x + fast_exp2(sink - softmax.shift(both));
      top = both;
    }
    x = sum == 0.f ? 0.f : x / sum;
    if constexpr (Config::kGeneral) x *= 65536.f / (65536.f - p.dropout_threshold);
    if (row >= task.rows || !o.speaks_for_row()) return;
    const float lse = sum == 0.f ? -INFINITY : top + log2f(sum);
    const int64_t at = task.lse_offset(p, row);
    if (args.splits == 1) static_cast<float*>(p.lse)[at] = lse * kLn2;
    else args.lse_partial[task.split * args.partial_rows + at] = lse;
  });
  o.for_each([&](float& x, int m, int r, int) { x *= factor.v[m][r]; });
}

// Writes o, in the tensors' dtype through q_smem, or in float32 for combine.cu.
template <typename Config>
FX_DEVICE void write_output(typename Config::Output& o, typename Config::QTile q_smem,
                            const FwdArgs& args, const FwdTask& task, int warp_row) {
  using T = typename Config::T;
  const AttnParams& p = args.params;
  const int head_dim = static_cast<int>(p.head_dim_v);
  copy_wait<0>();  // q has arrived, also where there was no block of keys to wait for it
  if (args.splits > 1) {
    RowVec<T, Config::kRowsPerWarp, float*> out;  // null: no such row
    out.for_each([&](float*& x, int m, int r) {
      const int row = task.row0 + warp_row + o.row(m, r);
      const int64_t at = task.split * args.partial_rows + task.lse_offset(p, row);
      x = row < task.rows ? args.o_partial + at * head_dim : nullptr;
    });
    o.for_each([&](float& x, int m, int r, int col) {
      if (out.v[m][r] && col < head_dim) out.v[m][r][col] = x;
    });
    return;
  }
  __syncthreads();  // nobody reads q any more
  o.store(q_smem, warp_row);
  __syncthreads();  // the whole tile is there
  store_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<T*>(p.o.data) + task.offset(p.o, row); }, task.row0,
      task.rows, head_dim, in_chunks(p.o, sizeof(T)) && head_dim % (16 / sizeof(T)) == 0);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attn_fwd_kernel(const FwdArgs args) {
  using T = typename Config::T;
  constexpr int kStages = Config::kStages, kBlockKV = Config::kBlockKV;
  constexpr bool kStaged = Config::kTile.staged;
  static_assert(!kStaged || kStages == 1);
  const AttnParams& p = args.params;
  const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV>(args);
  if (task.row0 >= task.rows) return;  // this sequence is shorter than the longest
  const int warp_row = warp_id() * Config::kRowsPerWarp;

  extern __shared__ __align__(128) unsigned char smem[];
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  const QTile q_smem = QTile::in(smem);
  const auto k_smem = [&](int block) {
    return KvTile::in(smem + QTile::kBytes + block % kStages * KvTile::kBytes);
  };
  const auto v_smem = [&](int block) {
    return KvTile::in(smem + QTile::kBytes + (kStages + block % kStages) * KvTile::kBytes);
  };
  float* staging = reinterpret_cast<float*>(smem + QTile::kBytes + 2 * kStages * KvTile::kBytes);
  const KvLoader<Config> keys(p.k, task, static_cast<int>(p.head_dim), staging);
  const KvLoader<Config> values(p.v, task, static_cast<int>(p.head_dim_v),
                                staging + kBlockKV * Config::kHeadDim);

  load_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<const T*>(p.q.data) + task.offset(p.q, row); },
      task.row0, task.rows, static_cast<int>(p.head_dim), in_chunks(p.q, sizeof(T)));
  if (task.block_begin < task.block_end) {
    keys.load(k_smem(task.block_begin), task.block_begin);
    if constexpr (kStaged) copy_commit();
    if constexpr (kStages == 2 || kStaged) values.load(v_smem(task.block_begin), task.block_begin);
  }
  copy_commit();

  typename Config::QOperand q;
  if constexpr (Config::kTile.q_in_regs) {
    copy_wait<0>();
    __syncthreads();  // q has arrived
    q.load(q_smem, warp_row);
  } else {
    q = {q_smem, warp_row};
  }
  typename Config::Output o;
  o.clear();
  typename Config::Softmax softmax;

  if constexpr (kStaged)
    if (task.block_begin < task.block_end) keys.finish(k_smem(task.block_begin));

  for (int block = task.block_begin; block < task.block_end; ++block) {
    const int next = block + 1, kv0 = block * kBlockKV;
    if constexpr (!kStaged) copy_wait<0>();
    __syncthreads();  // this block has arrived; nobody reads the one before any more
    if constexpr (kStages == 1 && !kStaged) {
      values.load(v_smem(block), block);
    } else if (next < task.block_end) {
      keys.load(k_smem(next), next);
      if constexpr (kStages == 2) values.load(v_smem(next), next);
    }
    copy_commit();

    typename Config::Scores s;
    product_abt<Config::kHeadDim>(s, q, k_smem(block));  // s = q k^T

    if constexpr (kStaged) {
      values.finish(v_smem(block));
      __syncthreads();  // v is split; nobody reads k any more
      if (next < task.block_end) values.load(v_smem(next), next);
      copy_commit();
    } else if constexpr (kStages == 1) {
      copy_wait<0>();
      __syncthreads();  // v has arrived; nobody reads k any more
      if (next < task.block_end) keys.load(k_smem(next), next);
      copy_commit();
    }
    if constexpr (Config::kGeneral) apply_options(s, p, task, task.row0 + warp_row, kv0);
    if (block < task.whole_begin || block >= task.whole_end)
      apply_band(s, task, task.row0 + warp_row, kv0);

    // Where everything is masked, -inf * scale must not be NaN: a scale of 0 is nearly 0.
    const float scale =
        Config::kGeneral ? 1.f : fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f);
    softmax.step(s, o, scale);
    if constexpr (Config::kGeneral)
      if (p.dropout_threshold) apply_dropout(s, p, task, task.row0 + warp_row, kv0);
    mma_ab(o, s, v_smem(block));  // o += p v
    if constexpr (kStaged)
      if (next < task.block_end) keys.finish(k_smem(next));
  }

  normalise<Config>(o, softmax, args, task, task.row0 + warp_row);
  write_output<Config>(o, q_smem, args, task, warp_row);
}

}  // namespace flash_ext
