// The forward kernel. FlashAttention-2 (arXiv:2307.08691): one thread block owns a tile of query
// rows, each warp some of its rows, and K and V pass by in blocks.
#pragma once
#include "../tile/reg_tile.h"
#include "band.h"
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
  static constexpr bool kIssueBound = kTile.issue_bound;
  // Blocks that every row sees all of get a loop of their own, without the tests.
  static constexpr bool kWholeApart = kIssueBound && !kGeneral && kVariant.rows == FwdRows::many;
  // AMD's compilers read the second number of __launch_bounds__ as something else.
  static constexpr int kBlocksPerSm = kAmd ? 1 : kTile.blocks_per_sm;

  template <int kRows>
  using Tile = std::conditional_t<kIssueBound, PaddedTile<T, kRows, kHeadDim>,
                                  SharedTile<T, kRows, kHeadDim>>;
  using QTile = Tile<kBlockQ>;
  using KvTile = Tile<kBlockKV>;
  using Staging = flash_ext::Staging<kThreads, !kGeneral, kBlockKV, kHeadDim>;
  using Scores = AccTile<T, kRowsPerWarp, kBlockKV>;
  using Output = AccTile<T, kRowsPerWarp, kHeadDim>;
  using Softmax = OnlineSoftmax<T, kRowsPerWarp>;
  using Mask = std::conditional_t<kGeneral, MaskBlock<T, kRowsPerWarp, kBlockKV>, NoMask>;
  using QOperand = std::conditional_t<kTile.q_in_regs, OperandTile<T, kRowsPerWarp, kHeadDim>,
                                      SharedOperand<T, QTile>>;
};

// Copies one KV head's keys or values, a block after the other. With staging, load starts it and
// finish ends it.
template <typename Config>
struct KvLoader {
  using T = typename Config::T;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  const T* next;  // where the next block starts; 16-bit chunks: this thread's first
  int64_t stride;
  int rows, cols;  // rows: from there on
  bool chunks;
  float* staging;  // where the tile has one

  FX_DEVICE KvLoader(const TensorView& t, const FwdTask& task, int cols, float* staging)
      : next(static_cast<const T*>(t.data) + task.kv_offset(t)), stride(t.seq_stride),
        rows(task.seq_kv - task.block_begin * Config::kBlockKV), cols(cols),
        chunks(in_chunks(t, sizeof(T))), staging(staging) {
    next += task.block_begin * Config::kBlockKV * stride;
    if constexpr (!kFloat) {
      chunks = !Config::kGeneral || (chunks && cols % 8 == 0);
      using Mine = Chunks<Config::kThreads, Config::kBlockKV, Config::kHeadDim / 8>;
      if (chunks) next += Mine::row() * stride + Mine::col();
    }
  }

  // kWhole: none of the block's rows is missing.
  template <bool kWhole = false>
  FX_DEVICE void load(typename Config::KvTile dst) {
    const auto address = [&](int row) { return next + row * stride; };
    if constexpr (Config::kTile.staged)
      typename Config::Staging{staging}.start(address, 0, rows, cols, chunks);
    else if constexpr (kFloat)
      load_tile<Config::kThreads, !Config::kGeneral>(dst, address, 0, rows, cols, chunks);
    else if (chunks) load_rows<Config::kThreads, kWhole>(dst, next, stride, rows, cols);
    else load_tile<Config::kThreads, false>(dst, address, 0, rows, cols, false);
    next += Config::kBlockKV * stride;
    rows -= Config::kBlockKV;
  }
  // The newest load is still on its way, and another's.
  FX_DEVICE void finish(typename Config::KvTile dst) const {
    copy_wait<1>();
    typename Config::Staging{staging}.finish(dst);
  }
};

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
    Denominator all{softmax.reference.v[m][r], softmax.sum.v[m][r]};
    if (p.sinks && args.splits == 1 && row < task.rows)
      all.add_sink(static_cast<const float*>(p.sinks)[task.head_of(row)] * kLog2e);
    x = all.reciprocal();
    if constexpr (Config::kGeneral) x *= 65536.f / (65536.f - p.dropout_threshold);
    if (row >= task.rows || !o.speaks_for_row()) return;
    const float lse = all.sum == 0.f ? -INFINITY : all.top + log2f(all.sum);
    const int64_t at = task.lse_offset(p, row);
    if (args.splits > 1) args.lse_partial[task.split * args.partial_rows + at] = lse;
    else if (p.lse) static_cast<float*>(p.lse)[at] = lse * kLn2;
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
      x = row < task.rows ? args.o_partial + at * args.partial_cols : nullptr;
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
  const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV, Config::kGeneral>(args, blockIdx.x);
  if (task.row0 >= task.rows) return;  // this sequence is shorter than the longest
  const int warp_row = warp_id() * Config::kRowsPerWarp;

  extern __shared__ __align__(128) unsigned char smem[];
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  const QTile q_smem = QTile::in(smem);
  const auto k_smem = [&](unsigned block) {
    return KvTile::in(smem + QTile::kBytes + block % kStages * KvTile::kBytes);
  };
  const auto v_smem = [&](unsigned block) {
    return KvTile::in(smem + QTile::kBytes + (kStages + block % kStages) * KvTile::kBytes);
  };
  float* staging = reinterpret_cast<float*>(smem + QTile::kBytes + 2 * kStages * KvTile::kBytes);
  KvLoader<Config> keys(p.k, task, static_cast<int>(p.head_dim), staging);
  KvLoader<Config> values(p.v, task, static_cast<int>(p.head_dim_v),
                          staging + kBlockKV * Config::kHeadDim);

  load_tile<Config::kThreads, !Config::kGeneral>(
      q_smem, [&](int row) { return static_cast<const T*>(p.q.data) + task.offset(p.q, row); },
      task.row0, task.rows, static_cast<int>(p.head_dim), in_chunks(p.q, sizeof(T)));
  int block = task.block_begin;
  if (block < task.block_end) {
    keys.load(k_smem(block));
    if constexpr (kStaged) copy_commit();
    if constexpr (kStages == 2 || kStaged) values.load(v_smem(block));
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

  const int row0 = task.row0 + warp_row;
  typename Config::Mask mask(p, task, row0);
  // To scores to base 2. Where everything is masked, -inf * scale must not be NaN: a scale of 0 is
  // nearly 0.
  const float scale =
      Config::kGeneral ? kLog2e : fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f);
  // This warp's last rows see no keys of the blocks from warp_end on.
  const int warp_end = (task.query(row0 + Config::kRowsPerWarp - 1) + task.right) / kBlockKV + 1;

  if constexpr (kStaged)
    if (block < task.block_end) keys.finish(k_smem(block));

  // whole: every row sees all of these blocks, and of the one that is loaded meanwhile.
  const auto blocks_to = [&](int end, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    for (; block < end; ++block) {
      const int next = block + 1, kv0 = block * kBlockKV;
      const bool more = kWhole || next < task.block_end;
      const bool seen = kWhole || kStaged || block < warp_end;
      const auto load_next = [&] {
        if (more) {
          keys.template load<kWhole>(k_smem(next));
          if constexpr (kStages == 2) values.template load<kWhole>(v_smem(next));
        }
        copy_commit();
      };
      if constexpr (!kStaged) copy_wait<0>();
      __syncthreads();  // this block has arrived; nobody reads the one before any more
      if constexpr (kStaged) {
        load_next();
      } else if constexpr (kStages == 1) {
        values.template load<kWhole>(v_smem(block));
        copy_commit();
      } else if constexpr (!Config::kIssueBound) {
        load_next();
      }

      if constexpr (Config::kGeneral)
        if (seen && p.mask.data) mask.fetch(kv0);
      typename Config::Scores s;
      if (seen) product_abt<Config::kHeadDim>(s, q, k_smem(block));  // s = q k^T

      if constexpr (kStaged) {
        values.finish(v_smem(block));
        __syncthreads();  // v is split; nobody reads k any more
        if (more) values.load(v_smem(next));
        copy_commit();
      } else if constexpr (kStages == 1) {
        copy_wait<0>();
        __syncthreads();  // v has arrived; nobody reads k any more
        load_next();
      } else if constexpr (Config::kIssueBound) {
        load_next();
      }
      if (!seen) continue;

      if constexpr (Config::kGeneral) {
        apply_options(s, p, task, row0, kv0);
        if (p.mask.data) mask.add_to(s, kv0);
      }
      if constexpr (!kWhole)
        if (block < task.whole_begin || block >= task.whole_end) apply_band(s, task, row0, kv0);
      softmax.step(s, o, scale);
      if constexpr (Config::kGeneral)
        if (p.dropout_threshold) Dropout<T>(p, task).apply(s, row0, kv0);
      mma_ab(o, s, v_smem(block));  // o += p v
      if constexpr (kStaged)
        if (more) keys.finish(k_smem(next));
    }
  };
  if constexpr (Config::kWholeApart) {
    blocks_to(std::min(task.whole_begin, task.block_end), std::false_type{});
    blocks_to(std::min(task.whole_end, task.block_end) - 1, std::true_type{});
  }
  blocks_to(task.block_end, std::false_type{});

  normalise<Config>(o, softmax, args, task, row0);
  write_output<Config>(o, q_smem, args, task, warp_row);
}

}  // namespace flash_ext
