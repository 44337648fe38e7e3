// The forward kernel. FlashAttention-2 (arXiv:2307.08691): one thread block owns a tile of query
// rows, each warp some of its rows, and K and V pass by in blocks.
#pragma once
#include "../tile/reg_tile.h"
#include "fwd_task.h"
#include "fwd_variants.h"
#include "load_tile.h"
#include "online_softmax.h"
#include "scores.h"

namespace flash_ext {

template <FwdVariant kVariant>
struct FwdConfig {
  using T = std::conditional_t<kVariant.dtype == DType::f16, half_t, bf16_t>;
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
  using Scores = AccTile<T, kRowsPerWarp, kBlockKV>;
  using Output = AccTile<T, kRowsPerWarp, kHeadDim>;
  using Weights = OperandTile<T, kRowsPerWarp, kBlockKV>;
  using Softmax = OnlineSoftmax<T, kRowsPerWarp>;
  using QOperand = std::conditional_t<kTile.q_in_regs, OperandTile<T, kRowsPerWarp, kHeadDim>,
                                      SharedOperand<T, QTile>>;
};

FX_DEVICE bool in_chunks(const TensorView& t) {
  return (reinterpret_cast<uintptr_t>(t.data) % 16 |
          (t.batch_stride | t.head_stride | t.seq_stride) % 8) == 0;
}

// Copies blocks of one KV head's keys or values.
template <typename Config>
struct KvLoader {
  using T = typename Config::T;
  const T* base;
  int64_t stride;
  int rows, cols;
  bool chunks;

  FX_DEVICE KvLoader(const TensorView& t, const FwdTask& task, int cols)
      : base(static_cast<const T*>(t.data) + task.kv_offset(t)), stride(t.seq_stride),
        rows(task.seq_kv), cols(cols), chunks(in_chunks(t)) {}

  FX_DEVICE void load(typename Config::KvTile dst, int block) const {
    load_tile<Config::kThreads, !Config::kGeneral>(
        dst, [&](int row) { return base + row * stride; }, block * Config::kBlockKV, rows, cols,
        chunks);
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
      x = fast_exp2(top - both);
      sum = sum * x + fast_exp2(sink - both);
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
  copy_wait<0>();   // q has arrived, also where there was no block of keys to wait for it
  __syncthreads();  // nobody reads q any more
  o.store(q_smem, warp_row);
  __syncthreads();  // the whole tile is there
  store_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<T*>(p.o.data) + task.offset(p.o, row); }, task.row0,
      task.rows, head_dim, in_chunks(p.o) && head_dim % 8 == 0);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attn_fwd_kernel(const FwdArgs args) {
  using T = typename Config::T;
  constexpr int kStages = Config::kStages, kBlockKV = Config::kBlockKV;
  const AttnParams& p = args.params;
  const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV>(args);
  if (task.row0 >= task.rows) return;  // this sequence is shorter than the longest
  const int warp_row = warp_id() * Config::kRowsPerWarp;

  extern __shared__ __align__(128) unsigned char smem[];
  const typename Config::QTile q_smem{reinterpret_cast<T*>(smem)};
  const auto k_smem = [&](int block) {
    T* ring = q_smem.data + Config::kBlockQ * Config::kHeadDim;
    return typename Config::KvTile{ring + block % kStages * kBlockKV * Config::kHeadDim};
  };
  const auto v_smem = [&](int block) {
    return typename Config::KvTile{k_smem(block).data + kStages * kBlockKV * Config::kHeadDim};
  };
  const KvLoader<Config> keys(p.k, task, static_cast<int>(p.head_dim));
  const KvLoader<Config> values(p.v, task, static_cast<int>(p.head_dim_v));
  const int begin = task.block_begin, end = task.block_end;
  // Keys are wanted one block earlier than values.
  const auto start_copies = [&](int block) {
    if (block < end) keys.load(k_smem(block), block);
    if (begin < block && block <= end) values.load(v_smem(block - 1), block - 1);
    copy_commit();
  };

  load_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<const T*>(p.q.data) + task.offset(p.q, row); },
      task.row0, task.rows, static_cast<int>(p.head_dim), in_chunks(p.q));
  for (int i = 0; i < kStages; ++i) start_copies(begin + i);
  copy_wait<kStages - 1>();
  __syncthreads();  // q and the first keys have arrived

  typename Config::QOperand q;
  if constexpr (Config::kTile.q_in_regs) q.load(q_smem, warp_row);
  else q = {q_smem, warp_row};
  typename Config::Scores s;
  typename Config::Output o;
  typename Config::Softmax softmax;
  o.clear();

  // Where everything is masked, -inf * scale must not be NaN: a scale of 0 is nearly 0.
  const float scale = Config::kGeneral ? 1.f : fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f);
  const auto multiply = [&](int block) {  // s = q k^T
    s.clear();
    mma_abt<Config::kHeadDim>(s, q, k_smem(block));
  };
  const auto follow = [&](int block, auto partly) {  // partly: some row does not see all keys
    const int row0 = task.row0 + warp_row, kv0 = block * kBlockKV;
    if constexpr (Config::kGeneral) apply_options(s, p, task, row0, kv0);
    if (partly) apply_band(s, task, row0, kv0);
    softmax.follow(s, o, scale);
  };
  const auto weigh = [&](int block) {
    softmax.weigh(s, scale);
    if constexpr (Config::kGeneral)
      if (p.dropout_threshold)
        apply_dropout(s, p, task, task.row0 + warp_row, block * kBlockKV);
    typename Config::Weights weights;
    weights.round(s);
    return weights;
  };
  // The next block's scores do not depend on this one's weights: all this runs intermingled.
  const auto step = [&](int block, auto partly) {
    const typename Config::Weights weights = weigh(block);
    multiply(block + 1);
    mma_ab<kBlockKV>(o, weights, v_smem(block));  // o += p v
    follow(block + 1, partly);
  };

  // The last rows of the warp see no more keys than those of the blocks below warp_end.
  const int last = task.query(task.row0 + warp_row + Config::kRowsPerWarp - 1) + task.right;
  const int warp_end = std::min(end, last / kBlockKV + 1);
  if (begin < warp_end) {
    multiply(begin);
    follow(begin, true);
  }
  for (int block = begin; block < end; ++block) {
    const int next = block + 1;
    copy_wait<kStages - 2>();
    __syncthreads();  // these values and the next keys have arrived; those before are not read any more
    start_copies(block + kStages);
    if (next < warp_end) {
      const bool partly = next < task.whole_begin || next >= task.whole_end;
      if constexpr (Config::kGeneral) step(block, partly);
      else if (partly) step(block, std::true_type{});
      else step(block, std::false_type{});
    } else if (block < warp_end) {
      const typename Config::Weights weights = weigh(block);
      mma_ab<kBlockKV>(o, weights, v_smem(block));
    }
  }

  normalise<Config>(o, softmax, args, task, task.row0 + warp_row);
  write_output<Config>(o, q_smem, args, task, warp_row);
}

}  // namespace flash_ext
