// dk and dv of wide heads on Hopper, see bwd_wide_variants.h. A thread block owns 64 keys, and blocks of
// 64 query rows pass by. dk and dv do not fit the registers of one warpgroup, so one computes weights
// and dv, the other the gradients of scores and dk; the weights go from one to the other through shared
// memory, where each thread finds those of its own scores. Everything is transposed, [keys, rows], so
// that weights and gradients are left operands where they are, in registers. The other four warps fill the
// rings of q and grad_o and put what must be known of rows beside them.
#pragma once
#include "bwd_kernel.h"
#include "bwd_wide_variants.h"
#include "write_rows.h"

namespace flash_ext::sm90 {

template <DType kDType, int kDim, DkvTile kSize = dkv_tile(kDim)>
struct DkvConfig {
  using T = Element<kDType>;
  static constexpr DkvTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kQStages = kTile.q_stages, kGradStages = kTile.grad_stages;
  static constexpr int kWeightStages = kTile.weight_stages;

  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using QTile = SwizzledTile<T, kBlockQ, kHeadDim>;
  using Scores = AccTile<T, 16, kBlockQ>;
  using Weights = OperandTile<T, 16, kBlockQ>;
  using KvGrad = AccTile<T, 16, kHeadDim>;
};

template <typename Config>
struct DkvShared {
  using T = typename Config::T;
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  static constexpr int kQ = 2 * KvTile::kBytes, kGradO = kQ + Config::kQStages * QTile::kBytes;
  static constexpr int kRest = kGradO + Config::kGradStages * QTile::kBytes;
  // Four weights of each of a warpgroup's threads a chunk.
  static constexpr int kChunks = Config::kBlockQ / 16;
  struct Rest {
    uint4 weights[Config::kWeightStages][kChunks][kWarpgroup];
    BlockStats<Config::kBlockQ> stats[Config::kQStages];
    Place q[Config::kQStages], rows[Config::kQStages], grad_o[Config::kGradStages];
    Place handed_over[Config::kWeightStages];
    Mbarrier kv;
    BwdTask task;  // here, because registers are dear
  };
  static constexpr int kBytes = kRest + static_cast<int>(sizeof(Rest));
  unsigned char* base;

  FX_DEVICE Rest& rest() const { return *reinterpret_cast<Rest*>(base + kRest); }
  FX_DEVICE KvTile k() const { return {reinterpret_cast<T*>(base)}; }
  FX_DEVICE KvTile v() const { return {reinterpret_cast<T*>(base + KvTile::kBytes)}; }
  FX_DEVICE QTile q(int stage) const {
    return {reinterpret_cast<T*>(base + kQ + stage * QTile::kBytes)};
  }
  FX_DEVICE QTile grad_o(int stage) const {
    return {reinterpret_cast<T*>(base + kGradO + stage * QTile::kBytes)};
  }

  FX_DEVICE void init() const {
    constexpr int kWarps = 2 * kWarpgroup / kWarpSize;  // both warpgroups read all of it
    for (Place& place : rest().q) place.init(kWarps);
    for (Place& place : rest().rows) place.init(kWarps);
    for (Place& place : rest().grad_o) place.init(kWarps);
    for (Place& place : rest().handed_over)
      place.full.init(kWarps / 2), place.empty.init(kWarps / 2);
    rest().kv.init(2);
    Mbarrier::publish_init();
  }
};

// Two neighbours of an operand.
template <typename T>
FX_DEVICE float2 widened(uint32_t pair) {
  if constexpr (std::is_same_v<T, half_t>)
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  else return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// What both warpgroups do alike. Of one that computes, `id` is 0 for dv and 1 for dk.
template <typename Config>
class DkvCompute {
 protected:
  using T = typename Config::T;
  using Scores = typename Config::Scores;
  using Weights = typename Config::Weights;
  using KvGrad = typename Config::KvGrad;
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  static constexpr int kBlockQ = Config::kBlockQ, kHeadDim = Config::kHeadDim;

  FX_DEVICE DkvCompute(const BwdArgs& args, const BwdTask& task, DkvShared<Config> shared, int id)
      : args(args), p(args.params), task(task), shared(shared), rest(shared.rest()), id(id),
        warp_row(uniform(static_cast<int>(warp_id()) % 4) * 16), block(task.block_end - 1),
        tail(p.cu_seqlens_q && task.rows % kBlockQ ? task.rows / kBlockQ : -1),
        steps(args.heads_of_group * std::max(task.block_end - task.block_begin, 0)) {}

  const BwdArgs& args;
  const AttnBwdParams& p;
  const BwdTask& task;
  const DkvShared<Config> shared;
  typename DkvShared<Config>::Rest& rest;
  const int id, warp_row;
  int block;       // of rows
  const int tail;  // the block that ends behind a packed sequence's last row
  const int steps;
  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kGradStages> grad_at;
  RingPosition<Config::kWeightStages> weights_at;

  FX_DEVICE int next_block() const {
    return block == task.block_begin ? task.block_end - 1 : block - 1;
  }
  FX_DEVICE void wait_for_warpgroup() { barrier_wait(1 + id, kWarpgroup); }
  // Each warpgroup clears what it reads, and so waits for none.
  FX_DEVICE void clear_tail(QTile tile, int of_block) {
    if (of_block != tail) return;
    clear_rows(tile, task.rows % kBlockQ, kBlockQ, threadIdx.x % kWarpgroup, kWarpgroup);
    wait_for_warpgroup();  // all rows are clear
  }
  FX_DEVICE QTile arrived_q(RingPosition<Config::kQStages> at, int of_block) {
    rest.q[at.stage].wait_full(at.parity);
    clear_tail(shared.q(at.stage), of_block);
    return shared.q(at.stage);
  }
  FX_DEVICE QTile arrived_grad(RingPosition<Config::kGradStages> at, int of_block) {
    rest.grad_o[at.stage].wait_full(at.parity);
    clear_tail(shared.grad_o(at.stage), of_block);
    return shared.grad_o(at.stage);
  }
  FX_DEVICE void start_product(Scores& s, KvTile keys, QTile rows) {
    wgmma_fence();
    start_abt<kHeadDim>(s, keys, rows);  // s = keys rows^T
    wgmma_commit();
  }
  FX_DEVICE void start_sum(KvGrad& sum, const Weights& weights, QTile rows) {
    wgmma_fence();
    start_ab(sum, weights, rows);  // sum += weights rows
    wgmma_commit();
  }
  FX_DEVICE void release_rows() {
    __syncwarp();  // all lanes have read
    rest.rows[q_at.stage].release();
  }
  // f(the column's and the next one's number of `of_column`, n, half) for an atom's halves.
  template <typename F>
  FX_DEVICE static void with_columns(const float* of_column, F f) {
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = 16 * n + 8 * half + static_cast<int>(lane_id() % 4) * 2;
        f(*reinterpret_cast<const float2*>(of_column + col), n, half);
      }
  }
  FX_DEVICE void write(const KvGrad& x, KvTile tile, const TensorView& dst, int cols) {
    wait_for_warpgroup();  // nobody reads the tile any more
    const int key = task.key0 + warp_row;
    write_rows(x, tile, warp_row,
               static_cast<T*>(dst.data) + task.kv_offset(dst) + int64_t{key} * dst.seq_stride,
               dst.seq_stride, task.seq_kv - key, cols);
  }
};

// The warpgroup that computes weights and dv.
template <typename Config>
class DvCompute : DkvCompute<Config> {
  using Base = DkvCompute<Config>;
  using typename Base::KvGrad;
  using typename Base::Scores;
  using typename Base::Weights;
  using T = typename Config::T;
  static constexpr int kBlockQ = Config::kBlockQ;
  const float scale;

 public:
  FX_DEVICE DvCompute(const BwdArgs& args, const BwdTask& task, DkvShared<Config> shared)
      : Base(args, task, shared, 0),
        scale(static_cast<float>(args.params.scale) * kLog2e) {}

  FX_DEVICE void run() {
    KvGrad dv;
    dv.clear();
    this->rest.kv.wait(0);
    if (this->steps > 0) all_blocks(dv);
    this->write(dv, this->shared.k(), this->p.dv, static_cast<int>(this->p.head_dim_v));
  }

 private:
  // Scores become weights, which the other warpgroup gets, too.
  FX_DEVICE void weigh(Scores& s, Weights& weights) {
    auto& rest = this->rest;
    rest.rows[this->q_at.stage].wait_full(this->q_at.parity);
    this->with_columns(rest.stats[this->q_at.stage].lse, [&](float2 lse, int n, int half) {
      float* x = s.atom[0][n].reg + 4 * half;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fast_exp2(fmaf(x[i], scale, -(i % 2 ? lse.y : lse.x)));
    });
    this->release_rows();
    if (this->block < this->task.whole_begin || this->block >= this->task.whole_end) hide(s);
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n)
      weights.atom[0][n] = MmaAtom<T>::to_operand(s.atom[0][n]);

    Place& place = rest.handed_over[this->weights_at.stage];
    place.wait_empty(this->weights_at.parity);
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n) {
      const uint32_t* x = weights.atom[0][n].reg;
      rest.weights[this->weights_at.stage][n][threadIdx.x % kWarpgroup] = {x[0], x[1], x[2], x[3]};
    }
    __syncwarp();  // those of all lanes are there
    if (lane_id() == 0) place.full.arrive();
    this->weights_at.advance();
  }
  FX_DEVICE void hide(Scores& s) {
    const BwdTask& task = this->task;
    int begin[2], end[2];  // the rows that see a key
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int key = task.key0 + this->warp_row + s.row(0, slot), row0 = this->block * kBlockQ;
      begin[slot] = key - task.right - row0;
      end[slot] = key < task.seq_kv ? key + task.left + 1 - row0 : begin[slot];
    }
    s.for_each([&](float& x, int, int slot, int col) {
      x = col >= begin[slot] && col < end[slot] ? x : 0.f;
    });
  }

  FX_DEVICE void all_blocks(KvGrad& dv) {
    auto& rest = this->rest;
    Scores s;
    Weights weights;
    this->start_product(s, this->shared.k(), this->arrived_q(this->q_at, this->block));
    wgmma_wait<0>();
#pragma unroll 1
    for (int step = 0;; ++step) {
      arrived(s);
      rest.q[this->q_at.stage].release();
      weigh(s, weights);
      this->start_sum(dv, weights, this->arrived_grad(this->grad_at, this->block));
      if (step + 1 == this->steps) break;
      this->block = this->next_block();
      this->q_at.advance();
      this->start_product(s, this->shared.k(), this->arrived_q(this->q_at, this->block));
      wgmma_wait<1>();
      arrived(dv);
      rest.grad_o[this->grad_at.stage].release();
      this->grad_at.advance();
      wgmma_wait<0>();
    }
    wgmma_wait<0>();
    arrived(dv);
    rest.grad_o[this->grad_at.stage].release();
  }
};

// The warpgroup that computes the gradients of scores and dk.
template <typename Config>
class DkCompute : DkvCompute<Config> {
  using Base = DkvCompute<Config>;
  using typename Base::KvGrad;
  using typename Base::Scores;
  using typename Base::Weights;
  using T = typename Config::T;
  static constexpr int kBlockQ = Config::kBlockQ;

 public:
  FX_DEVICE DkCompute(const BwdArgs& args, const BwdTask& task, DkvShared<Config> shared)
      : Base(args, task, shared, 1) {}

  FX_DEVICE void run() {
    KvGrad dk;
    dk.clear();
    this->rest.kv.wait(0);
    if (this->steps > 0) all_blocks(dk);
    dk.for_each([&](float& x, int, int, int) { x *= static_cast<float>(this->p.scale); });
    this->write(dk, this->shared.v(), this->p.dk, static_cast<int>(this->p.head_dim));
  }

 private:
  // ds: first the weights, then the gradients of their scores.
  FX_DEVICE void differentiate(const Scores& dp, Weights& ds) {
    auto& rest = this->rest;
    Place& place = rest.handed_over[this->weights_at.stage];
    place.wait_full(this->weights_at.parity);
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n) {
      const uint4 x = rest.weights[this->weights_at.stage][n][threadIdx.x % kWarpgroup];
      ds.atom[0][n] = {{x.x, x.y, x.z, x.w}};
    }
    __syncwarp();  // all lanes have read
    place.release();
    this->weights_at.advance();

    rest.rows[this->q_at.stage].wait_full(this->q_at.parity);
    this->with_columns(rest.stats[this->q_at.stage].delta, [&](float2 delta, int n, int half) {
#pragma unroll
      for (int slot = 0; slot < 2; ++slot) {
        const float* x = dp.atom[0][n].reg + 4 * half + 2 * slot;
        uint32_t& pair = ds.atom[0][n].reg[2 * half + slot];
        const float2 weight = widened<T>(pair);
        pair = ptx::cvt<T>(weight.x * (x[0] - delta.x), weight.y * (x[1] - delta.y));
      }
    });
    this->release_rows();
  }

  FX_DEVICE void all_blocks(KvGrad& dk) {
    auto& rest = this->rest;
    Scores dp;
    Weights ds;
    this->start_product(dp, this->shared.v(), this->arrived_grad(this->grad_at, this->block));
    wgmma_wait<0>();
#pragma unroll 1
    for (int step = 0;; ++step) {
      arrived(dp);
      rest.grad_o[this->grad_at.stage].release();
      differentiate(dp, ds);
      this->start_sum(dk, ds, this->arrived_q(this->q_at, this->block));
      if (step + 1 == this->steps) break;
      this->block = this->next_block();
      this->grad_at.advance();
      this->start_product(dp, this->shared.v(), this->arrived_grad(this->grad_at, this->block));
      wgmma_wait<1>();
      arrived(dk);
      rest.q[this->q_at.stage].release();
      this->q_at.advance();
      wgmma_wait<0>();
    }
    wgmma_wait<0>();
    arrived(dk);
    rest.q[this->q_at.stage].release();
  }
};

// The index-th thread block.
template <typename Config>
FX_DEVICE void dkv_block(const BwdArgs& args, unsigned index, unsigned char* smem) {
  const DkvShared<Config> shared{smem};
  BwdTask& task = shared.rest().task;
  if (threadIdx.x == 0) {
    const auto [key_block, group] =
        block_of_group(index, args.blocks_kv, args.groups, args.groups_at_once);
    task =
        bwd_task<Config::kBlockKV, Config::kBlockQ>(args, group * args.heads_of_group, key_block);
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map), prefetch(args.grad_o_map);
    shared.init();
  }
  __syncthreads();                       // the task is there, and the barriers are set up
  if (task.key0 >= task.seq_kv) return;  // this sequence is shorter than the longest
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<kWideLoaderRegisters>();
    const int warp = uniform(static_cast<int>(warp_id()));
    if (warp == 0 && lane_id() == 0) load<Config>(args, task, shared);
    if (warp == 1) load_stats<Config>(args, task, shared);
  } else {
    take_registers<kWideRegisters>();
    if (warpgroup == 1) DvCompute<Config>(args, task, shared).run();
    else DkCompute<Config>(args, task, shared).run();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    dkv_kernel(const __grid_constant__ BwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  dkv_block<Config>(args, blockIdx.x, smem);
#endif
}

}  // namespace flash_ext::sm90
