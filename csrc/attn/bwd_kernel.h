// The main backward kernel: dk, dv and the float32 sums of dq. FlashAttention-2 (arXiv:2307.08691,
// algorithm 2), with the scores transposed: one thread block owns a tile of keys, each warp some of
// them, and query rows pass by in blocks. A warp's weights, [keys, rows], then are the left operand
// of dv and dk where they are, in registers; only dq needs those of all warps.
#pragma once
#include "../tile/reg_tile.h"
#include "bwd_scores.h"
#include "bwd_task.h"
#include "bwd_variants.h"
#include "load_tile.h"

namespace flash_ext {

template <BwdVariant kVariant>
struct BwdConfig {
  using T = std::conditional_t<kVariant.dtype == DType::f16, half_t, bf16_t>;
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
  static_assert(kBlockQ % (kWarpsD * kCols) == 0 && kHeadDim % (kWarpsD * kAtom) == 0);
  static_assert(kDqRowParts * kTile.dq_rows == kBlockQ && kDqColParts * kTile.dq_cols == kHeadDim &&
                kDqParts * kTile.warps() == kDqRowParts * kDqColParts);

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
  using T = typename Config::T;
  T* base;
  static constexpr int kKv = Config::kBlockKV * Config::kHeadDim;
  static constexpr int kQ = Config::kBlockQ * Config::kHeadDim;
  static constexpr int kWeights = Config::kBlockKV * Config::kBlockQ;

  FX_DEVICE typename Config::KvTile k() const { return {base}; }
  FX_DEVICE typename Config::KvTile v() const { return {base + kKv}; }
  FX_DEVICE typename Config::QTile q(int block) const {
    return {base + 2 * kKv + block % Config::kStages * kQ};
  }
  FX_DEVICE typename Config::QTile grad_o(int block) const {
    return {base + 2 * kKv + (Config::kStages + block % Config::kStages) * kQ};
  }
  FX_DEVICE typename Config::WeightTile ds() const {
    return {base + 2 * kKv + 2 * Config::kStages * kQ};
  }
  FX_DEVICE typename Config::WeightTile p() const { return {ds().data + kWeights}; }  // warps_d 2
  FX_DEVICE RowFacts<Config::kGeneral, Config::kBlockQ>& rows() const {
    return *reinterpret_cast<RowFacts<Config::kGeneral, Config::kBlockQ>*>(
        ds().data + (Config::kWarpsD > 1 ? 2 : 1) * kWeights);
  }
};

// Starts to copy a block of query rows of q and grad_o.
template <typename Config>
FX_DEVICE void load_rows(const BwdSmem<Config>& smem, const BwdArgs& args, const BwdTask& task,
                         int block) {
  using T = typename Config::T;
  const AttnBwdParams& p = args.params;
  const auto load = [&](typename Config::QTile dst, const TensorView& t, int64_t cols) {
    load_tile<Config::kThreads, !Config::kGeneral>(
        dst, [&](int row) { return static_cast<const T*>(t.data) + task.offset(t, row); },
        block * Config::kBlockQ, task.rows, static_cast<int>(cols), in_chunks(t));
  };
  load(smem.q(block), p.q, p.head_dim);
  load(smem.grad_o(block), p.grad_o, p.head_dim_v);
}

// dq of a block of rows += ds k, with ds = [keys, rows] in shared memory.
template <typename Config>
FX_DEVICE void add_dq(const BwdSmem<Config>& smem, const BwdArgs& args, const BwdTask& task,
                      float* sums, int row0) {
  constexpr int kRows = Config::kTile.dq_rows;
  using Atom = MmaAtom<typename Config::T>;
#pragma unroll
  for (int i = 0; i < Config::kDqParts; ++i) {
    const int part = static_cast<int>(warp_id()) * Config::kDqParts + i;
    const int part_row = part / Config::kDqColParts * kRows;
    const int part_col = part % Config::kDqColParts * kAtom;
    const ColumnsOf k_cols(smem.k(), part_col);
    typename Config::DqPart dq;
    dq.clear();
    mma_steps<Config::kBlockKV / kAtom>(
        dq,
        [&](int m, int k) {
          return Atom::load_a_transposed(smem.ds(), part_row + m * kAtom, k * kAtom);
        },
        [&](int n, int k) {
          return Atom::load_b_transposed(k_cols, n * kAtom * Config::kDqColParts, k * kAtom);
        });
    dq.add_to_global([&](int m, int slot) -> float* {
      const int row = row0 + part_row + dq.row(m, slot);
      return row < task.rows ? sums + row * int64_t{Config::kHeadDim} + part_col : nullptr;
    });
  }
}

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
      static_cast<int>(cols), in_chunks(dst) && cols % 8 == 0);
}

template <typename Config>
FX_DEVICE void bwd_block(const BwdArgs& args, const BwdTask& task, const BwdSmem<Config>& smem,
                         float* dq_sums) {
  using T = typename Config::T;
  constexpr int kBlockQ = Config::kBlockQ, kWarpsD = Config::kWarpsD;
  const AttnBwdParams& p = args.params;
  const int warp_key = static_cast<int>(warp_id()) / kWarpsD * Config::kKeysPerWarp;
  const int warp_d = static_cast<int>(warp_id()) % kWarpsD;
  constexpr int kRowsOfWarp = kBlockQ / kWarpsD;  // whose scores it computes
  const int warp_row = warp_d * kRowsOfWarp;
  const int warp_col = warp_d * kAtom;  // of dk and dv, and every kWarpsD-th column of atoms

  const auto load_kv = [&](typename Config::KvTile dst, const TensorView& t, int64_t cols) {
    const T* base = static_cast<const T*>(t.data) + task.kv_offset(t);
    load_tile<Config::kThreads, !Config::kGeneral>(
        dst, [&](int row) { return base + row * t.seq_stride; }, task.key0, task.seq_kv,
        static_cast<int>(cols), in_chunks(t));
  };
  load_kv(smem.k(), p.k, p.head_dim);
  load_kv(smem.v(), p.v, p.head_dim_v);
  RowFactsLoader<Config::kGeneral, kBlockQ> facts(args, task);
  if (task.block_begin < task.block_end) {
    load_rows(smem, args, task, task.block_begin);
    facts.fetch(task.block_begin);
  }
  copy_commit();

  typename Config::KvGrad dk, dv;
  dk.clear(), dv.clear();
  for (int block = task.block_begin; block < task.block_end; ++block) {
    const int row0 = block * kBlockQ;
    const bool more = block + 1 < task.block_end;
    facts.put(smem.rows());
    copy_wait<0>();
    __syncthreads();  // this block has arrived; nobody reads the one before nor its ds any more
    if (more) facts.fetch(block + 1);
    if (Config::kStages == 2 && more) load_rows(smem, args, task, block + 1);
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
    __syncthreads();  // ds (and p) of all warps are there
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
      if (more) load_rows(smem, args, task, block + 1);
      copy_commit();
    }
    add_dq(smem, args, task, dq_sums, row0);
  }

  copy_wait<0>();   // k and v have arrived, also where no row was there to wait for them
  __syncthreads();  // nobody reads k and v any more
  const float dv_factor = Config::kGeneral ? 65536.f / (65536.f - p.dropout_threshold) : 1.f;
  write_kv_grad<Config>(dk, static_cast<float>(p.scale), smem.k(), p.dk, task, warp_key, warp_col,
                        p.head_dim);
  write_kv_grad<Config>(dv, dv_factor, smem.v(), p.dv, task, warp_key, warp_col, p.head_dim_v);
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attn_bwd_kernel(const BwdArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  const BwdSmem<Config> smem{reinterpret_cast<typename Config::T*>(memory)};
  const auto [chain, index] =
      block_of_group(blockIdx.x, args.chains, args.groups, args.groups_at_once);
  const RowGroup group = row_group(args.params, index, args.pack);
  float* const sums = args.dq + chain * args.dq_chain_stride +
                      args.first_row(group.batch, group.kv_head, group.first_q) * Config::kHeadDim;
  for (int block = chain; block * Config::kBlockKV < group.seq_kv; block += args.chains) {
    bwd_block<Config>(
        args, bwd_task<Config::kBlockKV, Config::kBlockQ>(args, group, block * Config::kBlockKV),
        smem, sums);
    __syncthreads();  // what the next block loads overwrites nothing that is still read
  }
}

}  // namespace flash_ext
