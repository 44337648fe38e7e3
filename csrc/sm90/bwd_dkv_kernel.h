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

template <DType kDType, int kDim, Options kWith = Options::none, DkvTile kSize = dkv_tile(kDim)>
struct DkvConfig {
  using T = Element<kDType>;
  static constexpr bool kGeneral = kWith != Options::none, kDropout = kWith == Options::dropout;
  static constexpr DkvTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kQStages = kTile.q_stages, kGradStages = kTile.grad_stages;
  static constexpr int kWeightStages = kTile.weight_stages;
  // Named barriers: of each warpgroup; of both with the warp that puts what must be known of rows into a
  // place; of both when weights are in a place, and when they have been taken from there.
  static constexpr int kOwnBarrier = 1, kRowsBarrier = kOwnBarrier + 2;
  static constexpr int kThereBarrier = kRowsBarrier + kQStages;
  static constexpr int kTakenBarrier = kThereBarrier + kWeightStages;

  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using QTile = SwizzledTile<T, kBlockQ, kHeadDim>;
  using Scores = AccTile<T, 16, kBlockQ>;
  using Weights = OperandTile<T, 16, kBlockQ>;
  using KvGrad = AccTile<T, 16, kHeadDim>;
  using Stats = BlockStats<kBlockQ>;
};

template <typename Config>
struct DkvShared {
  using T = typename Config::T;
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  static constexpr int kQ = 2 * KvTile::kBytes, kGradO = kQ + Config::kQStages * QTile::kBytes;
  using MaskRows = typename BwdScoresOf<Config>::MaskRows;
  static constexpr int kMask = kGradO + Config::kGradStages * QTile::kBytes;
  static constexpr int kMaskBytes = Config::kGeneral ? static_cast<int>(sizeof(MaskRows)) : 0;
  static constexpr int kRest = kMask + 4 * kMaskBytes;  // of each warp that computes weights
  // Four weights of each of a warpgroup's threads a chunk.
  static constexpr int kChunks = Config::kBlockQ / 16;
  struct Rest {
    uint4 weights[Config::kWeightStages][kChunks][kWarpgroup];
    typename Config::Stats stats[Config::kQStages];
    Place q[Config::kQStages], grad_o[Config::kGradStages];
    Mbarrier rows[Config::kQStages], k, v;
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
  FX_DEVICE MaskRows& mask(int warp) const {
    return *reinterpret_cast<MaskRows*>(base + kMask + warp * kMaskBytes);
  }

  FX_DEVICE void init() const {
    constexpr int kWarps = 2 * kWarpgroup / kWarpSize;  // both warpgroups read all of it
    for (Place& place : rest().q) place.init(kWarps);
    for (Place& place : rest().grad_o) place.init(kWarps);
    for (Mbarrier& barrier : rest().rows) barrier.init(kWarpSize);
    rest().k.init(1), rest().v.init(1);
    Mbarrier::publish_init();
  }
};

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load_for_dkv(const BwdArgs& args, const BwdTask& task, DkvShared<Config> shared) {
  auto& rest = shared.rest();
  const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
  const Corner keys{static_cast<int>(task.first_k) + task.key0, task.kv_head, batch};
  copy_tile(shared.k(), args.k_map, keys, rest.k);
  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kGradStages> grad_at;
  bool first = true;
  for_each_block(args, task, [&](int head, int block) {
    const Corner rows{static_cast<int>(task.first_q) + block * Config::kBlockQ, task.head + head,
                      batch};
    Place &q = rest.q[q_at.stage], &grad_o = rest.grad_o[grad_at.stage];
    q.wait_empty(q_at.parity);
    copy_tile(shared.q(q_at.stage), args.q_map, rows, q.full);
    if (first) copy_tile(shared.v(), args.v_map, keys, rest.v);
    first = false;
    grad_o.wait_empty(grad_at.parity);
    copy_tile(shared.grad_o(grad_at.stage), args.grad_o_map, rows, grad_o.full);
    q_at.advance(), grad_at.advance();
  });
  if (first) copy_tile(shared.v(), args.v_map, keys, rest.v);
}

// One warp: what must be known of rows.
template <typename Config>
FX_DEVICE void load_stats_for_dkv(const BwdArgs& args, const BwdTask& task,
                                  DkvShared<Config> shared) {
  static_assert(Config::kBlockQ == 2 * kWarpSize);
  const int lane = static_cast<int>(lane_id());
  RingPosition<Config::kQStages> at;
  int step = 0;
  for_each_block(args, task, [&](int head, int block) {
    const RowStats* first = args.stats + first_row_of(args, task, head);
    RowStats x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = block * Config::kBlockQ + i * kWarpSize + lane;
      x[i] = row < task.rows ? first[row] : RowStats{INFINITY, 0.f};
    }
    auto& stats = shared.rest().stats[at.stage];
    if (step++ >= Config::kQStages)  // all have read what was there before
      barrier_wait(Config::kRowsBarrier + at.stage, kWarpSize + 2 * kWarpgroup);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      stats.lse[i * kWarpSize + lane] = x[i].lse, stats.delta[i * kWarpSize + lane] = x[i].delta;
    shared.rest().rows[at.stage].arrive();  // of all lanes: all of it is there
    at.advance();
  });
}

// A warpgroup that computes dv, or dk. Both multiply their keys by a block of rows, make an operand of
// the product, and add its product with other rows to their sum.
template <typename Config, bool kDk>
class DkvCompute {
  using T = typename Config::T;
  using Scores = typename Config::Scores;
  using Weights = typename Config::Weights;
  using KvGrad = typename Config::KvGrad;
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  static constexpr int kBlockQ = Config::kBlockQ, kHeadDim = Config::kHeadDim;
  using OwnScores = std::conditional_t<kDk, NoBwdScores, BwdScoresOf<Config>>;
  static constexpr bool kWeighsOptions = Config::kGeneral && !kDk;
  using ProductRing = RingPosition<kDk ? Config::kGradStages : Config::kQStages>;
  using SumRing = RingPosition<kDk ? Config::kQStages : Config::kGradStages>;

 public:
  FX_DEVICE DkvCompute(const BwdArgs& args, const BwdTask& task, DkvShared<Config> shared)
      : p(args.params), task(task), shared(shared), rest(shared.rest()),
        warp_row(uniform(static_cast<int>(warp_id()) % 4) * 16),
        scale(static_cast<float>(p.scale) * kLog2e), heads(args.heads_of_group),
        tail(p.cu_seqlens_q && task.rows % kBlockQ ? task.rows / kBlockQ : -1),
        steps(heads * std::max(task.block_end - task.block_begin, 0)),
        scores(p, task, shared.mask(warp_row / 16), task.key0 + warp_row),
        block(task.block_end - 1) {}

  FX_DEVICE void run() {
    KvGrad sum;
    sum.clear();
    (kDk ? rest.v : rest.k).wait(0);
    if (steps > 0) all_blocks(sum);
    if constexpr (kDk)
      sum.for_each([&](float& x, int, int, int) { x *= static_cast<float>(p.scale); });
    else if constexpr (Config::kDropout)
      sum.for_each([&](float& x, int, int, int) { x *= dropout_factor(); });
    wait_for_warpgroup();  // nobody reads these keys any more
    const TensorView& dst = kDk ? p.dk : p.dv;
    const int key = task.key0 + warp_row;
    write_rows(sum, keys(), warp_row,
               static_cast<T*>(dst.data) + task.kv_offset(dst) + int64_t{key} * dst.seq_stride,
               dst.seq_stride, task.seq_kv - key,
               static_cast<int>(kDk ? p.head_dim : p.head_dim_v));
  }

 private:
  const AttnBwdParams& p;
  const BwdTask& task;
  const DkvShared<Config> shared;
  typename DkvShared<Config>::Rest& rest;
  const int warp_row;
  const float scale;
  const int heads;
  const int tail;  // the block that ends behind a packed sequence's last row
  const int steps;
  OwnScores scores;
  int block, head = 0;  // of rows, whose product comes next
  int step = 0;         // blocks before it
  ProductRing product_at;
  SumRing sum_at, done_at;
  RingPosition<Config::kQStages> rows_at;
  RingPosition<Config::kWeightStages> weights_at;

  // A number of each of the columns that this lane holds of scores, for each half of an atom.
  struct OfColumns {
    float2 pair[kBlockQ / 8];
  };

  FX_DEVICE KvTile keys() const { return kDk ? shared.v() : shared.k(); }
  FX_DEVICE Place& product_place() {
    if constexpr (kDk) return rest.grad_o[product_at.stage];
    else return rest.q[product_at.stage];
  }
  FX_DEVICE Place& sum_place(SumRing at) {
    if constexpr (kDk) return rest.q[at.stage];
    else return rest.grad_o[at.stage];
  }
  FX_DEVICE void wait_for_warpgroup() { barrier_wait(Config::kOwnBarrier + kDk, kWarpgroup); }
  // By all lanes of what they have read or written: barriers of threads count warps at once.
  FX_DEVICE static void tell(int barrier) { barrier_arrive(barrier, 2 * kWarpgroup); }
  // Each warpgroup clears what it reads, and so waits for none.
  FX_DEVICE void clear_tail(QTile tile, int of_block) {
    if (of_block != tail) return;
    clear_rows(tile, task.rows % kBlockQ, kBlockQ, threadIdx.x % kWarpgroup, kWarpgroup);
    wait_for_warpgroup();  // all rows are clear
  }

  FX_DEVICE void start_product(Scores& s) {
    product_place().wait_full(product_at.parity);
    const QTile rows = kDk ? shared.grad_o(product_at.stage) : shared.q(product_at.stage);
    clear_tail(rows, block);
    wgmma_fence();
    start_abt<kHeadDim>(s, keys(), rows);  // s = keys rows^T
    wgmma_commit();
  }
  FX_DEVICE void start_sum(KvGrad& sum, const Weights& weights, int of_block) {
    sum_place(sum_at).wait_full(sum_at.parity);
    const QTile rows = kDk ? shared.q(sum_at.stage) : shared.grad_o(sum_at.stage);
    clear_tail(rows, of_block);
    sum_at.advance();
    wgmma_fence();
    start_ab(sum, weights, rows);  // sum += weights rows
    wgmma_commit();
  }
  FX_DEVICE OfColumns stats() {
    const auto& all = rest.stats[rows_at.stage];
    const float* first = (kDk ? all.delta : all.lse) + lane_id() % 4 * 2;
    rest.rows[rows_at.stage].wait(rows_at.parity);
    OfColumns x;
#pragma unroll
    for (int i = 0; i < kBlockQ / 8; ++i)
      x.pair[i] = *reinterpret_cast<const float2*>(first + 8 * i);
    release_stats();
    return x;
  }
  FX_DEVICE void release_stats() {
    if (step + Config::kQStages < steps)  // others take their place
      barrier_arrive(Config::kRowsBarrier + rows_at.stage, kWarpSize + 2 * kWarpgroup);
    rows_at.advance();
  }

  // Scores become weights, which the other warpgroup gets, too.
  FX_DEVICE void weigh(Scores& s, const OfColumns& lse, Weights& weights) {
#pragma unroll
    for (int i = 0; i < kBlockQ / 2; ++i) {
      float& x = s.atom[0][i / 8].reg[i % 8];
      const float2 y = lse.pair[i / 4];
      x = fast_exp2(fmaf(x, scale, -(i % 2 ? y.y : y.x)));
    }
    if (block < task.whole_begin || block >= task.whole_end) hide(s);
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n)
      weights.atom[0][n] = MmaAtom<T>::to_operand(s.atom[0][n]);
    hand_over(weights);
  }
  FX_DEVICE void hand_over(const Weights& weights) {
    if (step >= Config::kWeightStages)  // the other warpgroup has taken those before
      barrier_wait(Config::kTakenBarrier + weights_at.stage, 2 * kWarpgroup);
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n) {
      const uint32_t* x = weights.atom[0][n].reg;
      rest.weights[weights_at.stage][n][threadIdx.x % kWarpgroup] = {x[0], x[1], x[2], x[3]};
    }
    tell(Config::kThereBarrier + weights_at.stage);
    weights_at.advance();
  }
  FX_DEVICE void weigh_with_options(const Scores& s, Weights& weights) {
    Weights factors;
    rest.rows[rows_at.stage].wait(rows_at.parity);
    scores.weigh(s, weights, factors, rest.stats[rows_at.stage]);
    release_stats();
    hand_over(factors);
  }
  FX_DEVICE void hide(Scores& s) {
    int begin[2], end[2];  // the rows that see a key
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int key = task.key0 + warp_row + s.row(0, slot), row0 = block * kBlockQ;
      begin[slot] = key - task.right - row0;
      end[slot] = key < task.seq_kv ? key + task.left + 1 - row0 : begin[slot];
    }
    s.for_each([&](float& x, int, int slot, int col) {
      x = col >= begin[slot] && col < end[slot] ? x : 0.f;
    });
  }

  FX_DEVICE float dropout_factor() const {
    return 65536.f / (65536.f - static_cast<float>(p.dropout_threshold));
  }

  // ds: the gradients of the scores whose weights the other warpgroup hands over; with options times
  // softcap's slope, and negative where dropout drops them.
  FX_DEVICE void differentiate(const Scores& dp, const OfColumns& delta, Weights& ds) {
    barrier_wait(Config::kThereBarrier + weights_at.stage, 2 * kWarpgroup);  // they are there
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n) {
      const uint4 x = rest.weights[weights_at.stage][n][threadIdx.x % kWarpgroup];
      ds.atom[0][n] = {{x.x, x.y, x.z, x.w}};
    }
    if (step + Config::kWeightStages < steps) tell(Config::kTakenBarrier + weights_at.stage);
    weights_at.advance();
#pragma unroll
    for (int i = 0; i < kBlockQ / 4; ++i) {
      const float* x = dp.atom[0][i / 4].reg + 2 * (i % 4);
      const float2 y = delta.pair[i / 2];
      uint32_t& pair = ds.atom[0][i / 4].reg[i % 4];
      const float2 weight = widened<T>(pair);
      if constexpr (Config::kDropout) {
        const float kept0 = signbit(weight.x) ? 0.f : x[0] * dropout_factor();
        const float kept1 = signbit(weight.y) ? 0.f : x[1] * dropout_factor();
        pair = ptx::cvt<T>(fabsf(weight.x) * (kept0 - y.x), fabsf(weight.y) * (kept1 - y.y));
      } else {
        pair = ptx::cvt<T>(weight.x * (x[0] - y.x), weight.y * (x[1] - y.y));
      }
    }
  }

  // The product, when it has arrived, becomes an operand; kRunning groups of products run on. Returns
  // its block.
  template <int kRunning>
  FX_DEVICE int make_operand(Scores& s, Weights& weights) {
    const auto product_arrived = [&] {
      wgmma_wait<kRunning>();
      arrived(s);
      product_place().release();
      product_at.advance();
    };
    if constexpr (kWeighsOptions) {
      scores.draw(head, block);
      scores.prepare(head, block);
      product_arrived();
      weigh_with_options(s, weights);
    } else {
      const OfColumns of_columns = stats();
      product_arrived();
      if constexpr (kDk) differentiate(s, of_columns, weights);
      else weigh(s, of_columns, weights);
    }
    const int of_block = block;
    if (++head == heads) head = 0, --block;
    ++step;
    if constexpr (kWeighsOptions)
      if (step < steps) scores.fetch(head, block);
    return of_block;
  }
  FX_DEVICE void release_sum_rows() {
    sum_place(done_at).release();
    done_at.advance();
  }
  FX_DEVICE void all_blocks(KvGrad& sum) {
    Scores s;
    if constexpr (kWeighsOptions) scores.fetch(head, block);
    start_product(s);
    if constexpr (!kDk && !Config::kGeneral) {
      // A block's scores are started before the sum of the block before, which then runs while they
      // become weights. The other warpgroup is better off without: rows are needed for longer.
      Weights weights[2];
      int of_block = make_operand<0>(s, weights[0]);
      const auto next = [&](const Weights& now, Weights& then) {
        start_product(s);
        start_sum(sum, now, of_block);
        of_block = make_operand<1>(s, then);
        // The rows of the sum make room for others, without which the two warpgroups could wait for
        // each other.
        wgmma_wait<0>();
        arrived(sum);
        release_sum_rows();
      };
#pragma unroll 1
      for (int left = steps - 1;;) {
        if (left-- == 0) {
          start_sum(sum, weights[0], of_block);
          break;
        }
        next(weights[0], weights[1]);
        if (left-- == 0) {
          start_sum(sum, weights[1], of_block);
          break;
        }
        next(weights[1], weights[0]);
      }
    } else {
      Weights weights;
#pragma unroll 1
      for (int step = 0;; ++step) {
        start_sum(sum, weights, make_operand<0>(s, weights));
        if (step + 1 == steps) break;
        start_product(s);
        wgmma_wait<1>();
        arrived(sum);
        release_sum_rows();
      }
    }
    wgmma_wait<0>();
    arrived(sum);
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
  if constexpr (Config::kGeneral)
    if (args.seen.ranges && threadIdx.x < kWarpSize) {
      __syncwarp();  // the task is there
      leave_out_unseen<Config>(args, task);
    }
  __syncthreads();                       // the task is there, and the barriers are set up
  if (task.key0 >= task.seq_kv) return;  // this sequence is shorter than the longest
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<kWideLoaderRegisters>();
    const int warp = uniform(static_cast<int>(warp_id()));
    if (warp == 0 && lane_id() == 0) load_for_dkv<Config>(args, task, shared);
    if (warp == 1) load_stats_for_dkv<Config>(args, task, shared);
  } else {
    take_registers<kWideRegisters>();
    if (warpgroup == 1) DkvCompute<Config, false>(args, task, shared).run();
    else DkvCompute<Config, true>(args, task, shared).run();
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
