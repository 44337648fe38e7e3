// The main backward kernel: dk, dv and the float32 sums of dq. FlashAttention-2 (arXiv:2307.08691,
// algorithm 2), with the scores transposed: one thread block owns a tile of keys, each warp some of
// them, and query rows pass by in blocks. A warp's weights, [keys, rows], then are the left operand
// of dv and dk where they are, in registers; only dq needs those of all warps.
#pragma once
#include "../tile/reg_tile.h"
#include "bwd_dq.h"
#include "bwd_scores.h"
#include "bwd_task.h"
#include "bwd_variants.h"
#include "element.h"
#include "load_tile.h"

namespace flash_ext {

template <BwdVariant kVariant>
struct BwdConfig {
  using T = Element<kVariant.dtype>;
  static constexpr BwdTile kTile = bwd_tile(kVariant, kAmd);
  static constexpr bool kGeneral = kVariant.general;
  static constexpr int kHeadDim = kVariant.head_dim;
  static constexpr int kBlockKV = kTile.block_kv, kBlockQ = kTile.block_q;
  static constexpr int kStages = kTile.stages, kCols = kTile.cols;
  static constexpr int kWarpsD = kTile.warps_d, kKeysPerWarp = kTile.keys_per_warp();
  static constexpr int kThreads = kTile.warps() * kWarpSize;  // device code only
  static constexpr int kBlocksPerSm = kAmd ? 1 : kTile.blocks_per_sm;
  static constexpr int kDqRowParts = kBlockQ / kTile.dq_rows,
                       kDqColParts = kHeadDim / kTile.dq_cols;
  static constexpr int kDqParts = kDqRowParts * kDqColParts / kTile.warps();  // a warp
  static constexpr bool kAsyncDq = kTile.async_dq && kHasAddAsync;
  static_assert(kBlockQ % (kWarpsD * kCols) == 0 && kHeadDim % (kWarpsD * kAtom) == 0);
  static_assert(kDqRowParts * kTile.dq_rows == kBlockQ && kDqColParts * kTile.dq_cols == kHeadDim &&
                kDqParts * kTile.warps() == kDqRowParts * kDqColParts &&
                (kDqColParts & (kDqColParts - 1)) == 0 && (kWarpsD & (kWarpsD - 1)) == 0);

  using KvTile = SharedTile<T, kBlockKV, kHeadDim>;
  using QTile = SharedTile<T, kBlockQ, kHeadDim>;
  using WeightTile = SharedTile<T, kBlockKV, kBlockQ>;
  using Scores = AccTile<T, kKeysPerWarp, kCols>;
  using KvGrad = AccTile<T, kKeysPerWarp, kHeadDim / kWarpsD, kWarpsD>;
  using DqPart = AccTile<T, kTile.dq_rows, kTile.dq_cols, kDqColParts>;
};

// How shared memory is divided.
template <typename Config>
struct BwdSmem {
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  using WeightTile = typename Config::WeightTile;
  static constexpr int kQ = 2 * KvTile::kBytes, kGradO = kQ + Config::kStages * QTile::kBytes;
  static constexpr int kDs = kGradO + Config::kStages * QTile::kBytes;
  static constexpr int kP = kDs + WeightTile::kBytes;
  static constexpr int kDq = Config::kWarpsD > 1 ? kP + WeightTile::kBytes : kP;
  static constexpr int kRows =
      kDq + (Config::kAsyncDq ? Config::kBlockQ * Config::kHeadDim * int{sizeof(float)} : 0);
  unsigned char* base;

  FX_DEVICE KvTile k() const { return KvTile::in(base); }
  FX_DEVICE KvTile v() const { return KvTile::in(base + KvTile::kBytes); }
  FX_DEVICE QTile q(int block) const {
    return QTile::in(base + kQ + block % Config::kStages * QTile::kBytes);
  }
  FX_DEVICE QTile grad_o(int block) const {
    return QTile::in(base + kGradO + block % Config::kStages * QTile::kBytes);
  }
  FX_DEVICE WeightTile ds() const { return WeightTile::in(base + kDs); }
  FX_DEVICE WeightTile p() const { return WeightTile::in(base + kP); }
  FX_DEVICE float* dq() const { return reinterpret_cast<float*>(base + kDq); }
  FX_DEVICE auto& rows() const {
    return *reinterpret_cast<RowFacts<Config::kGeneral, Config::kBlockQ>*>(base + kRows);
  }
};

// Copies blocks of query rows of q or grad_o.
template <typename Config>
struct RowLoader {
  using T = typename Config::T;
  const TensorView& view;
  const BwdTask& task;
  const T* first;
  int cols;
  bool chunks;

  FX_DEVICE RowLoader(const TensorView& t, const BwdTask& task, int64_t cols)
      : view(t), task(task), first(static_cast<const T*>(t.data) + task.first_offset(t)),
        cols(static_cast<int>(cols)), chunks(in_chunks(t, sizeof(T))) {}

  FX_DEVICE void load(typename Config::QTile dst, int block) const {
    load_tile<Config::kThreads, !Config::kGeneral>(
        dst, [&](int row) { return first + task.from_first(view, row); }, block * Config::kBlockQ,
        task.rows, cols, chunks);
  }
};

// Writes dk or dv, times a factor, through the memory of k or v.
template <typename Config>
FX_DEVICE void write_kv_grad(typename Config::KvGrad& x, float factor, typename Config::KvTile smem,
                             const TensorView& dst, const BwdTask& task, int warp_key, int warp_col,
                             int64_t cols) {
  using T = typename Config::T;
  x.for_each([&](float& y, int, int, int) { y *= factor; });
  x.store(ColumnsOf(smem, warp_col), warp_key);
  __syncthreads();  // the whole tile is there
  T* base = static_cast<T*>(dst.data) + task.kv_offset(dst);
  store_tile<Config::kThreads, !Config::kGeneral>(
      smem, [&](int row) { return base + row * dst.seq_stride; }, task.key0, task.seq_kv,
      static_cast<int>(cols), in_chunks(dst, sizeof(T)) && cols % (16 / sizeof(T)) == 0);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attn_bwd_kernel(const BwdArgs args) {
  using T = typename Config::T;
  constexpr int kBlockQ = Config::kBlockQ, kWarpsD = Config::kWarpsD;
  const AttnBwdParams& p = args.params;
  const auto [key_block, group] =
      block_of_group(blockIdx.x, args.blocks_kv, args.groups, args.groups_at_once);
  const BwdTask task = bwd_task<Config::kBlockKV, kBlockQ>(args, group, key_block);
  if (task.key0 >= task.seq_kv) return;  // this sequence is shorter than the longest
  extern __shared__ __align__(128) unsigned char memory[];
  const BwdSmem<Config> smem{memory};
  const int warp_key = static_cast<int>(warp_id()) / kWarpsD * Config::kKeysPerWarp;
  const int warp_d = static_cast<int>(warp_id()) % kWarpsD;
  constexpr int kRowsOfWarp = kBlockQ / kWarpsD;  // whose scores it computes
  const int warp_row = warp_d * kRowsOfWarp;
  const int warp_col = warp_d * kAtom;  // of dk and dv, and every kWarpsD-th column of atoms

  const auto load_kv = [&](typename Config::KvTile dst, const TensorView& t, int64_t cols) {
    const T* base = static_cast<const T*>(t.data) + task.kv_offset(t);
    load_tile<Config::kThreads, !Config::kGeneral>(
        dst, [&](int row) { return base + row * t.seq_stride; }, task.key0, task.seq_kv,
        static_cast<int>(cols), in_chunks(t, sizeof(T)));
  };
  load_kv(smem.k(), p.k, p.head_dim);
  load_kv(smem.v(), p.v, p.head_dim_v);
  const RowLoader<Config> q_rows(p.q, task, p.head_dim), grad_o_rows(p.grad_o, task, p.head_dim_v);
  const auto load_rows = [&](int block) {
    q_rows.load(smem.q(block), block);
    grad_o_rows.load(smem.grad_o(block), block);
  };
  RowFactsLoader<Config::kGeneral, kBlockQ> facts(args, task);
  const int first_block = task.block_end - 1;
  if (task.block_begin < task.block_end) {
    load_rows(first_block);
    facts.fetch(first_block);
  }
  copy_commit();

  const DqSum<Config, BwdSmem<Config>> dq(args, task, smem);
  typename Config::KvGrad dk, dv;
  dk.clear(), dv.clear();
  // From the last row up: thread blocks that run together then are at the same rows, which are in
  // the L2 cache, also where each sees other ones of the first.
  for (int block = first_block; block >= task.block_begin; --block) {
    const bool more = block > task.block_begin;
    facts.put(smem.rows());
    copy_wait<0>();
    __syncthreads();  // this block has arrived; nobody works on the one before any more
    if (block < first_block) dq.hand_over(block + 1);
    if (more) facts.fetch(block - 1);
    if (Config::kStages == 2 && more) load_rows(block - 1);
    copy_commit();

#pragma unroll
    for (int part = 0; part < kRowsOfWarp; part += Config::kCols) {
      const int first = warp_row + part;  // of the block's rows
      const auto q = smem.q(block).below(first), grad_o = smem.grad_o(block).below(first);
      typename Config::Scores s, ds;
      BwdScores<Config> scores(args, task, smem.rows(), warp_key, first);
      s.clear();
      mma_abt<Config::kHeadDim>(s, SharedOperand<T, typename Config::KvTile>{smem.k(), warp_key},
                                q);
      scores.weights(s, block < task.whole_begin || block >= task.whole_end);
      scores.start_gradient(ds);
      mma_abt<Config::kHeadDim>(ds, SharedOperand<T, typename Config::KvTile>{smem.v(), warp_key},
                                grad_o);
      scores.gradient(ds, s);
      ds.store(ColumnsOf(smem.ds(), warp_row), warp_key, part);
      if constexpr (kWarpsD == 1) {
        mma_ab(dv, s, grad_o);
        mma_ab(dk, ds, q);
      } else {
        s.store(ColumnsOf(smem.p(), warp_row), warp_key, part);
      }
    }
    dq.prepare(block);
    __syncthreads();  // ds (and p) of all warps are there, and dq may be added to
    if constexpr (kWarpsD > 1) {
      const auto weights_times = [&](typename Config::KvGrad& x, typename Config::WeightTile w,
                                     typename Config::QTile rows) {
        const SharedOperand<T, typename Config::WeightTile> a{w, warp_key};
        const ColumnsOf cols(rows, warp_col);
        mma_steps<kBlockQ / kAtom>(
            x, [&](int m, int k) { return a.get(m, k); },
            [&](int n, int k) {
              return MmaAtom<T>::load_b_transposed(cols, n * kAtom * kWarpsD, k * kAtom);
            });
      };
      weights_times(dv, smem.p(), smem.grad_o(block));
      weights_times(dk, smem.ds(), smem.q(block));
    }
    if constexpr (Config::kStages == 1) {
      if constexpr (kWarpsD > 1) __syncthreads();  // nobody reads q and grad_o any more
      if (more) load_rows(block - 1);
      copy_commit();
    }
    dq.add(block);
  }

  copy_wait<0>();   // k and v have arrived, also where no row was there to wait for them
  __syncthreads();  // nobody reads k and v any more; the last block's dq is there
  const bool any = task.block_begin < task.block_end;
  if (any) dq.hand_over(task.block_begin);
  const float dv_factor = Config::kGeneral ? 65536.f / (65536.f - p.dropout_threshold) : 1.f;
  write_kv_grad<Config>(dk, static_cast<float>(p.scale), smem.k(), p.dk, task, warp_key, warp_col,
                        p.head_dim);
  write_kv_grad<Config>(dv, dv_factor, smem.v(), p.dv, task, warp_key, warp_col, p.head_dim_v);
  if (any) dq.finish(task.block_begin);
}

}  // namespace flash_ext
