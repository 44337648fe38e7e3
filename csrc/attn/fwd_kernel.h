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

// Of the variants without mask tensors.
struct NoMask {
  FX_DEVICE NoMask(const AttnParams&, const FwdTask&, int) {}
  FX_DEVICE void fetch(int) const {}
};

template <FwdVariant kVariant>
struct FwdConfig {
  using T = std::conditional_t<kVariant.dtype == DType::f16, half_t, bf16_t>;
  static constexpr FwdTile kTile = fwd_tile(kVariant, kAmd);
  static constexpr bool kGeneral = kVariant.general;
  static constexpr int kHeadDim = kVariant.head_dim;
  static constexpr int kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kStages = kTile.stages, kRowsPerWarp = kTile.rows_per_warp();
  static constexpr int kParts = kTile.parts;
  static constexpr int kKeysPerWarp = kBlockKV / kParts, kColsPerWarp = kHeadDim / kParts;
  static constexpr int kThreads = kTile.warps * kWarpSize;  // device code only
  // Blocks without a mask get a loop of their own, without its tests.
  static constexpr bool kWholeApart = !kVariant.general && kVariant.rows == FwdRows::many;
  // AMD's compilers read the second number of __launch_bounds__ as something else.
  static constexpr int kBlocksPerSm = kAmd ? 1 : kTile.blocks_per_sm;

  using QTile = PaddedTile<T, kBlockQ, kHeadDim>;
  using KvTile = PaddedTile<T, kBlockKV, kHeadDim>;
  using WeightTile = PaddedTile<T, kBlockQ, kBlockKV>;
  using Scores = AccTile<T, kRowsPerWarp, kKeysPerWarp>;
  using Output = AccTile<T, kRowsPerWarp, kColsPerWarp>;
  using Softmax = OnlineSoftmax<T, kRowsPerWarp>;
  using Mask = std::conditional_t<kGeneral, MaskBlock<T, kRowsPerWarp, kKeysPerWarp>, NoMask>;
  using QOperand = std::conditional_t<kTile.q_in_regs, OperandTile<T, kRowsPerWarp, kHeadDim>,
                                      SharedOperand<T, QTile>>;
};

FX_DEVICE bool in_chunks(const TensorView& t) {
  return (reinterpret_cast<uintptr_t>(t.data) % 16 |
          (t.batch_stride | t.head_stride | t.seq_stride) % 8) == 0;
}

// Copies one KV head's keys or values, a block after the other.
template <typename Config>
struct KvLoader {
  using T = typename Config::T;
  const T* next;  // where the next block starts; with chunks: this thread's first one
  int64_t stride;
  int rows, cols;  // rows: from there on
  bool chunks;     // 16 bytes at a time

  FX_DEVICE KvLoader(const TensorView& t, const FwdTask& task, int64_t cols)
      : next(static_cast<const T*>(t.data) + task.kv_offset(t) +
             task.block_begin * Config::kBlockKV * t.seq_stride),
        stride(t.seq_stride), rows(task.seq_kv - task.block_begin * Config::kBlockKV),
        cols(static_cast<int>(cols)), chunks(!Config::kGeneral || (in_chunks(t) && cols % 8 == 0)) {
    using Mine = Chunks<Config::kThreads, Config::kBlockKV, Config::kHeadDim / 8>;
    if (chunks) next += Mine::row() * stride + Mine::col();
  }

  // kWhole: all rows of this block are there.
  template <bool kWhole>
  FX_DEVICE void load(typename Config::KvTile dst) {
    if (chunks)
      load_rows<Config::kThreads, kWhole>(dst, next, stride, rows, cols);
    else
      load_tile<Config::kThreads, false>(
          dst, [&](int row) { return next + row * stride; }, 0, rows, cols, false);
    next += Config::kBlockKV * stride;
    rows -= Config::kBlockKV;
  }
};

// Which rows, keys and columns are this warp's: the scores of its rows and, of each block, its keys;
// then its columns of the output. The warps that share rows (FwdTile::parts) talk through memory.
template <typename Config>
struct WarpShare {
  using T = typename Config::T;
  using Rows = RowVec<T, Config::kRowsPerWarp>;
  typename Config::WeightTile weights;  // of all keys of a block
  float* row_value;                     // [parts, block_q]
  int part = static_cast<int>(warp_id()) % Config::kParts;
  int row = static_cast<int>(warp_id()) / Config::kParts * Config::kRowsPerWarp;  // the first

  FX_DEVICE typename Config::KvTile keys(typename Config::KvTile k) const {
    return {k.at(part * Config::kKeysPerWarp, 0)};
  }
  FX_DEVICE typename Config::KvTile columns(typename Config::KvTile v) const {
    return {v.at(0, part * Config::kColsPerWarp)};
  }

  // x, a value a row, becomes the same in all lanes and warps that share the row.
  template <typename Op>
  FX_DEVICE void reduce(Rows& x, Op op) const {
    x.reduce_lanes(op);
    if constexpr (Config::kParts > 1) {
      const auto place = [&](int m, int r, int of) {
        return row_value + of * Config::kBlockQ + row + Config::Output::row(m, r);
      };
      x.for_each([&](float& y, int m, int r) { *place(m, r, part) = y; });
      __syncthreads();  // all values are there
      x.for_each([&](float& y, int m, int r) {
        for (int of = 1; of < Config::kParts; ++of)
          y = op(y, *place(m, r, (part + of) % Config::kParts));
      });
      __syncthreads();  // they have been read
    }
  }

  // What the weights of s, this warp's scores, add to o, where several warps share rows. Their
  // common reference cannot follow the maximum before the weights are known to be too large.
  // `meanwhile` runs when nobody reads k any more.
  template <typename F>
  FX_DEVICE void add_products(typename Config::Output& o, typename Config::Scores& s,
                              typename Config::Softmax& softmax, typename Config::KvTile v,
                              float scale, F meanwhile) const {
    typename Config::WeightTile mine{weights.at(0, part * Config::kKeysPerWarp)};
    const Rows before = softmax.sum;
    const auto weigh = [&] {
      typename Config::Scores weights = s;
      softmax.weigh(weights, scale);
      weights.store(mine, row);
    };
    weigh();
    bool high = false;
    softmax.sum.for_each([&](float& sum, int m, int r) {
      high |= !(sum - before.v[m][r] <= Config::Softmax::kMostWeight);
    });
    copy_wait<0>();
    if (__syncthreads_or(high)) {  // v and the weights are there; nobody reads k any more
      Rows top = softmax.lane_top(s);
      reduce(top, [](float a, float b) { return fmaxf(a, b); });
      softmax.sum = before;
      softmax.raise(top, o, scale);
      weigh();
      __syncthreads();  // the new weights are there
    }
    meanwhile();
    mma_ab<Config::kBlockKV>(o, SharedOperand<T, typename Config::WeightTile>{weights, row},
                             columns(v));
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
                         const FwdArgs& args, const FwdTask& task, const WarpShare<Config>& warp) {
  const AttnParams& p = args.params;
  warp.reduce(softmax.sum, [](float a, float b) { return a + b; });
  RowVec<typename Config::T, Config::kRowsPerWarp> factor;
  factor.for_each([&](float& x, int m, int r) {
    const int row = task.row0 + warp.row + o.row(m, r);
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
    if (row >= task.rows || !o.speaks_for_row() || warp.part > 0) return;
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
                            const FwdArgs& args, const FwdTask& task,
                            const WarpShare<Config>& warp) {
  using T = typename Config::T;
  const AttnParams& p = args.params;
  const int head_dim = static_cast<int>(p.head_dim_v), col0 = warp.part * Config::kColsPerWarp;
  if (args.splits > 1) {
    RowVec<T, Config::kRowsPerWarp, float*> out;  // null: no such row
    out.for_each([&](float*& x, int m, int r) {
      const int row = task.row0 + warp.row + o.row(m, r);
      const int64_t at = task.split * args.partial_rows + task.lse_offset(p, row);
      x = row < task.rows ? args.o_partial + at * args.partial_cols + col0 : nullptr;
    });
    o.for_each([&](float& x, int m, int r, int col) {
      if (out.v[m][r] && col0 + col < head_dim) out.v[m][r][col] = x;
    });
    return;
  }
  copy_wait<0>();   // q has arrived, also where there was no block of keys to wait for it
  __syncthreads();  // nobody reads q any more
  o.store(typename Config::QTile{q_smem.at(0, col0)}, warp.row);
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
  constexpr int kAhead = kStages - 1;  // blocks that are loaded before they are wanted
  constexpr int kNewest = std::max(kAhead - 1, 0);  // of them, need not have arrived
  constexpr bool kShared = Config::kParts > 1;
  static_assert(!kShared || (kAhead == 0 && !Config::kGeneral));
  const AttnParams& p = args.params;
  const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV>(args);
  if (task.row0 >= task.rows) return;  // this sequence is shorter than the longest

  extern __shared__ __align__(128) unsigned char smem[];
  const typename Config::QTile q_smem{reinterpret_cast<T*>(smem)};
  constexpr int kKvSize = Config::KvTile::kSize;
  T* const k_ring = q_smem.data + Config::QTile::kSize;
  const auto k_smem = [&](unsigned block) {
    return typename Config::KvTile{k_ring + block % kStages * kKvSize};
  };
  const auto v_smem = [&](unsigned block) {
    return typename Config::KvTile{k_ring + (kStages + block % kStages) * kKvSize};
  };
  T* const after_ring = k_ring + 2 * kStages * kKvSize;
  const WarpShare<Config> warp{
      {after_ring}, reinterpret_cast<float*>(after_ring + Config::WeightTile::kSize)};
  KvLoader<Config> keys(p.k, task, p.head_dim), values(p.v, task, p.head_dim_v);

  load_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<const T*>(p.q.data) + task.offset(p.q, row); },
      task.row0, task.rows, static_cast<int>(p.head_dim), in_chunks(p.q));
  int block = task.block_begin;
  if constexpr (kAhead == 0) {
    if (block < task.block_end) keys.template load<false>(k_smem(block));
    copy_commit();
  }
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (block + i < task.block_end) {
      keys.template load<false>(k_smem(block + i));
      values.template load<false>(v_smem(block + i));
    }
    copy_commit();
  }

  typename Config::QOperand q;
  if constexpr (Config::kTile.q_in_regs) {
    copy_wait<kNewest>();
    __syncthreads();  // q has arrived
    q.load(q_smem, warp.row);
  } else {
    q = {q_smem, warp.row};
  }
  typename Config::Output o;
  o.clear();
  typename Config::Softmax softmax;
  // To scores to base 2. Where everything is masked, -inf * scale must not be NaN: a scale of 0 is
  // nearly 0.
  const float scale =
      Config::kGeneral ? kLog2e : fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f);
  const int row0 = task.row0 + warp.row;
  typename Config::Mask mask(p, task, row0);
  // The last rows of this warp see no keys from warp_end on.
  const int warp_end =
      (task.query(row0 + Config::kRowsPerWarp - 1) + task.right) / kBlockKV + 1;

  // whole: every row sees all keys of these blocks, and nothing is missing in those loaded meanwhile.
  const auto blocks_to = [&](int end, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    for (; block < end; ++block) {
      const int next = block + std::max(kAhead, 1);  // what is loaded meanwhile
      const bool seen = kWhole || kShared || block < warp_end;
      copy_wait<kNewest>();
      __syncthreads();  // this block has arrived; nobody reads the one before any more
      if constexpr (kAhead == 0) {
        values.template load<kWhole>(v_smem(block));
        copy_commit();
      }

      const int kv0 = block * kBlockKV + warp.part * Config::kKeysPerWarp;
      if (seen && p.mask.data) mask.fetch(kv0);
      typename Config::Scores s;
      s.clear();
      if (seen) mma_abt<Config::kHeadDim>(s, q, warp.keys(k_smem(block)));  // s = q k^T

      const auto load_next = [&] {
        if (kWhole || next < task.block_end) {
          keys.template load<kWhole>(k_smem(next));
          if constexpr (kAhead > 0) values.template load<kWhole>(v_smem(next));
        }
        copy_commit();
      };
      if constexpr (kAhead == 0 && !kShared) {
        copy_wait<0>();
        __syncthreads();  // v has arrived; nobody reads k any more
      }
      if constexpr (!kShared) load_next();  // not before the product, which would wait for its issue
      if (!seen) continue;

      if constexpr (Config::kGeneral) {
        apply_options(s, p, task, row0, kv0);
        if (p.mask.data) mask.add_to(s, kv0);
      }
      if constexpr (!kWhole)
        if (block < task.whole_begin || block >= task.whole_end) apply_band(s, task, row0, kv0);
      if constexpr (kShared) {
        warp.add_products(o, s, softmax, v_smem(block), scale, load_next);
      } else {
        softmax.follow(s, o, scale);
        softmax.weigh(s, scale);
        if constexpr (Config::kGeneral)
          if (p.dropout_threshold) apply_dropout(s, p, task, row0, kv0);
        mma_ab(o, s, v_smem(block));  // o += p v
      }
    }
  };
  if constexpr (Config::kWholeApart) {
    blocks_to(std::min(task.whole_begin, task.block_end), std::false_type{});
    blocks_to(std::min(task.whole_end, task.block_end) - std::max(kAhead, 1), std::true_type{});
  }
  blocks_to(task.block_end, std::false_type{});

  normalise<Config>(o, softmax, args, task, warp);
  write_output<Config>(o, q_smem, args, task, warp);
}

}  // namespace flash_ext
