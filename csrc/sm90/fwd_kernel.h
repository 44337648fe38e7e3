// The forward kernel for Hopper. FlashAttention-3 (arXiv:2407.08608): one warp has the copy engine
// fill a ring of keys and values, and warpgroups of 64 rows each compute. While a warpgroup turns one
// block's scores into weights, the tensor cores multiply for another one.
#pragma once
#include "../attn/element.h"
#include "../attn/scores.h"
#include "band.h"
#include "fwd_args.h"
#include "fwd_variants.h"
#include "softmax.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace flash_ext::sm90 {

template <DType kDType, int kDim, Options kWith = Options::none,
          FwdTile kSize = fwd_tile(kDim, kWith, false)>
struct FwdConfig {
  using T = Element<kDType>;
  static constexpr bool kGeneral = kWith != Options::none;
  static constexpr bool kDropout = kWith == Options::dropout;
  static constexpr FwdTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kStages = kTile.stages, kQStages = kTile.q_stages;
  static constexpr int kWarpgroups = kTile.warpgroups, kThreads = (kWarpgroups + 1) * kWarpgroup;
  static constexpr int kBlockQ = kWarpgroups * 64, kBlockKV = kTile.block_kv;

  using QTile = SwizzledTile<T, 64, kHeadDim>;  // of a warpgroup
  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using Scores = AccTile<T, 16, kBlockKV>;
  using Weights = OperandTile<T, 16, kBlockKV>;
  using Output = AccTile<T, 16, kHeadDim>;
  using Mask = std::conditional_t<kGeneral, MaskBlock<T, 16, kBlockKV>, NoMask>;
};

inline constexpr int kTasks = 2;  // the tile that is computed and the next one

template <typename Config>
struct Shared {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int kStages = Config::kStages, kWarpgroups = Config::kWarpgroups;
  static constexpr int kQTiles = kWarpgroups * Config::kQStages;
  static constexpr int kTileBytes = kQTiles * QTile::kBytes + 2 * kStages * KvTile::kBytes;
  struct Places {
    Place q[kQTiles], k[kStages], v[kStages], task[kTasks];
    FwdTask tasks[kTasks];  // one without rows: there are no more
    Mbarrier late;          // the tile that is being loaded will soon be complete
  };
  static constexpr int kBytes = kTileBytes + static_cast<int>(sizeof(Places));
  unsigned char* base;

  FX_DEVICE Places& places() const { return *reinterpret_cast<Places*>(base + kTileBytes); }
  FX_DEVICE Place& q_place(int stage, int warpgroup) const {
    return places().q[stage * kWarpgroups + warpgroup];
  }
  FX_DEVICE QTile q(int stage, int warpgroup) const {
    return {reinterpret_cast<T*>(base + (stage * kWarpgroups + warpgroup) * QTile::kBytes)};
  }
  FX_DEVICE KvTile k(int stage) const {
    return {reinterpret_cast<T*>(base + kQTiles * QTile::kBytes + stage * KvTile::kBytes)};
  }
  FX_DEVICE KvTile v(int stage) const { return k(kStages + stage); }

  FX_DEVICE void init() const {
    constexpr int kWarps = kWarpgroup / kWarpSize;
    for (Place& place : places().q) place.init(kWarps);
    for (Place& place : places().k) place.init(kWarps * kWarpgroups);
    for (Place& place : places().v) place.init(kWarps * kWarpgroups);
    for (Place& place : places().task) place.init(kWarpgroup * kWarpgroups + 1);  // all threads
    places().late.init(1);
    Mbarrier::publish_init();
  }
};

// Which tiles are this thread block's. Each block takes the next one when it is done, or they are dealt
// to and fro, so that nobody always gets the longer ones. They are counted from the last one down: so
// the longest come first, and if a group of heads is smaller than the others, it is the first one.
template <typename Config>
class TakeTiles {
 public:
  FX_DEVICE explicit TakeTiles(const FwdArgs& args) : args(args) {}
  // The next one that has rows; without rows: there is none.
  FX_DEVICE FwdTask next() {
    const unsigned tiles = static_cast<unsigned>(args.heads * args.blocks_q);
    for (unsigned number; (number = next_number()) < tiles;) {
      const FwdTask task =
          fwd_task<Config::kBlockQ, Config::kBlockKV, Config::kGeneral>(args, tiles - 1 - number);
      if (task.row0 < task.rows) return task;
    }
    return {};
  }

 private:
  const FwdArgs& args;
  int round = -1;

  FX_DEVICE unsigned next_number() {
    ++round;
    if (args.taken && round > 0) return gridDim.x + atomicAdd(args.taken, 1u);
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }
};

// One thread tells the others their tiles. A tile is taken as late as possible, so that all thread
// blocks end together, and yet before anybody waits for it.
template <typename Config>
FX_DEVICE void plan(const FwdArgs& args, Shared<Config> shared) {
  TakeTiles<Config> take(args);
  RingPosition<kTasks> at;
  for (RingPosition<1> late;; late.advance()) {
    const FwdTask task = take.next();
    Place& place = shared.places().task[at.stage];
    place.wait_empty(at.parity);
    shared.places().tasks[at.stage] = task;
    place.full.arrive();
    if (task.rows == 0) return;
    at.advance();
    shared.places().late.wait(late.parity);
  }
}

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load(const FwdArgs& args, Shared<Config> shared) {
  constexpr int kLate = 256 / Config::kBlockKV;  // blocks, the time that it takes to plan a tile
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kQStages> q_at;
  RingPosition<kTasks> task_at;
  for (;; task_at.advance()) {
    Place& task_place = shared.places().task[task_at.stage];
    task_place.wait_full(task_at.parity);
    const FwdTask task = shared.places().tasks[task_at.stage];
    task_place.empty.arrive();
    if (task.rows == 0) return;
    const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
    const auto keys_at = [&](int block) {
      return Corner{static_cast<int>(task.first_k) + block * Config::kBlockKV, task.kv_head, batch};
    };
    const auto load_keys = [&](int block) {
      Place& place = shared.places().k[k_at.stage];
      place.wait_empty(k_at.parity);
      copy_tile(shared.k(k_at.stage), args.k_map, keys_at(block), place.full);
      k_at.advance();
    };
    const auto load_values = [&](int block) {
      Place& place = shared.places().v[v_at.stage];
      place.wait_empty(v_at.parity);
      copy_tile(shared.v(v_at.stage), args.v_map, keys_at(block), place.full);
      v_at.advance();
    };
    const bool any = task.block_begin < task.block_end;
    if (any) load_keys(task.block_begin);
    for (int i = 0; i < Config::kWarpgroups; ++i) {
      Place& place = shared.q_place(q_at.stage, i);
      place.wait_empty(q_at.parity);
      copy_tile(shared.q(q_at.stage, i), args.q_map,
                {static_cast<int>(task.first_q) + task.row0 + 64 * i, task.head, batch},
                place.full);
    }
    q_at.advance();
    if (!any) shared.places().late.arrive();
#pragma unroll 1
    for (int block = task.block_begin; block < task.block_end; ++block) {
      if (block == std::max(task.block_begin, task.block_end - kLate))
        shared.places().late.arrive();
      if (block + 1 < task.block_end) load_keys(block + 1);
      load_values(block);
    }
  }
}

// Divides by the softmax's denominator, in which the sink takes part, and writes lse. row0: the
// warp's first row.
template <typename Config>
FX_DEVICE void normalise(typename Config::Output& o, Softmax<typename Config::T>& softmax,
                         const AttnParams& p, const FwdTask& task, int row0) {
  softmax.sum.reduce_lanes([](float a, float b) { return a + b; });
  float* lse = static_cast<float*>(p.lse) + task.lse_offset(p, 0);
  RowVec<typename Config::T, 16> factor;
  factor.for_each([&](float& x, int m, int r) {
    const int row = row0 + o.row(m, r);
    Denominator all{softmax.reference.v[m][r], softmax.sum.v[m][r]};
    if (p.sinks) all.add_sink(static_cast<const float*>(p.sinks)[task.head] * kLog2e);
    x = all.reciprocal();
    if constexpr (Config::kDropout) x *= 65536.f / (65536.f - p.dropout_threshold);
    if (row >= task.rows || !o.speaks_for_row() || !p.lse) return;
    lse[row] = all.sum == 0.f ? -INFINITY : (all.top + log2f(all.sum)) * kLn2;
  });
  softmax.multiply(o, factor);
}

// Writes a warp's 16 rows of o. Of each 16 columns a lane holds two neighbours, and two that are
// eight columns on; two lanes exchange theirs, so that each has four neighbours.
template <typename Config>
FX_DEVICE void write_output(const typename Config::Output& o, const AttnParams& p,
                            const FwdTask& task, int row0) {
  using T = typename Config::T;
  const unsigned lane = lane_id();
  const bool odd = lane % 2;
  const int first_col = lane % 4 / 2 * 4 + (odd ? 8 : 0);
  T* out = static_cast<T*>(p.o.data) + task.first_offset(p.o) + first_col;
#pragma unroll
  for (int slot = 0; slot < 2; ++slot) {
    const int row = row0 + o.row(0, slot);
    T* to = out + row * p.o.seq_stride;
#pragma unroll
    for (int n = 0; n < Config::kHeadDim / 16; ++n) {
      const auto rounded = MmaAtom<T>::to_operand(o.atom[0][n]);
      const uint32_t low = rounded.reg[slot], high = rounded.reg[slot + 2];
      const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
      if (row < task.rows && n * 16 + first_col < p.head_dim_v)
        *reinterpret_cast<uint2*>(to + n * 16) = odd ? uint2{got, high} : uint2{low, got};
    }
  }
}

// Packed tensors: what follows the last key belongs to another sequence, and may be NaN, which a
// weight of zero would not hide. Every warpgroup does all of it, before its own products.
template <typename Config>
FX_DEVICE void clear_rows(typename Config::KvTile v, int from) {
  constexpr int kChunks = Config::KvTile::kBlocks * kBlockCols / 8;
  for (int i = threadIdx.x % kWarpgroup; i < (Config::kBlockKV - from) * kChunks; i += kWarpgroup)
    *reinterpret_cast<uint4*>(v.at(from + i / kChunks, i % kChunks * 8)) = {0, 0, 0, 0};
  ptx::fence_proxy_async();  // wgmma sees the zeros after the next barrier
}

// Warpgroup `id` of those that compute.
template <typename Config>
class Compute {
  using T = typename Config::T;
  static constexpr int kBlockKV = Config::kBlockKV, kWarpgroups = Config::kWarpgroups;

 public:
  FX_DEVICE Compute(const FwdArgs& args, Shared<Config> shared, int id)
      : args(args), p(args.params), shared(shared), id(id),
        warp_row(uniform(static_cast<int>(warp_id()) % 4) * 16),
        // To scores to base 2. Where everything is masked, -inf * scale must not be NaN: a scale of
        // 0 is nearly 0.
        scale(Config::kGeneral ? kLog2e : fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f)) {}

  FX_DEVICE void all_tiles() {
    if (id == kWarpgroups - 1) pass_turn();  // the first turn is the first one's
    RingPosition<kTasks> task_at;
    for (;;) {
      Place& place = shared.places().task[task_at.stage];
      place.wait_full(task_at.parity);
      FwdTask task = shared.places().tasks[task_at.stage];
      __syncwarp();  // lanes that go on together need fewer registers
      place.empty.arrive();
      task_at.advance();
      if (task.rows == 0) return;
      task.pack = Divisor{};  // heads are not packed here, and now the compiler knows
      tile(task);
    }
  }

 private:
  const FwdArgs& args;
  const AttnParams& p;
  const Shared<Config> shared;
  const int id, warp_row;
  const float scale;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kQStages> q_at;

  // With turns, one warpgroup after the other issues products, so that its weights are computed while
  // those of the others run. Barrier 1 + i is warpgroup i's, which waits there for the one before it.
  FX_DEVICE void take_turn() {
    if (args.turns) barrier_wait(1 + id, 2 * kWarpgroup);
  }
  FX_DEVICE void pass_turn() {
    if (args.turns) barrier_arrive(1 + (id + 1) % kWarpgroups, 2 * kWarpgroup);
  }
  FX_DEVICE void wait_for_warpgroup() { barrier_wait(1 + kWarpgroups + id, kWarpgroup); }

  FX_DEVICE void start_scores(typename Config::Scores& s, typename Config::QTile q) {
    wgmma_fence();
    start_abt<Config::kHeadDim>(s, q, shared.k(k_at.stage));  // s = q k^T
    wgmma_commit();
  }
  FX_DEVICE void scores_arrived(typename Config::Scores& s) {
    arrived(s);
    shared.places().k[k_at.stage].release();
    k_at.advance();
  }
  FX_DEVICE void start_output(typename Config::Output& o, typename Config::Weights& weights) {
    wgmma_fence();
    start_ab(o, weights, shared.v(v_at.stage));  // o += weights v
    wgmma_commit();
  }
  FX_DEVICE void output_arrived(typename Config::Output& o) {
    arrived(o);
    shared.places().v[v_at.stage].release();
    v_at.advance();
  }

  FX_DEVICE void tile(const FwdTask& task) {
    const int row0 = task.row0 + 64 * id;
    const typename Config::QTile q = shared.q(q_at.stage, id);
    Place& q_place = shared.q_place(q_at.stage, id);
    q_place.wait_full(q_at.parity);
    q_at.advance();

    typename Config::Output o;
    o.clear();
    Softmax<T> softmax;
    KeyBlocks own;  // the tile's blocks that these rows see
    if (row0 < task.rows)
      own = key_blocks<kBlockKV, Config::kGeneral>(task, row0, std::min(row0 + 64, task.rows),
                                                   args.seen);
    int passed = task.block_begin;
    if (own.block_begin < own.block_end) {
      pass_blocks(own.block_begin - passed);
      all_blocks(task, own, row0 + warp_row, q, q_place, o, softmax);
      passed = own.block_end;
    } else {
      q_place.release();
    }
    pass_blocks(task.block_end - passed);

    normalise<Config>(o, softmax, p, task, row0 + warp_row);
    write_output<Config>(o, p, task, row0 + warp_row);
  }

  // Blocks that only other warpgroups of the tile need.
  FX_DEVICE void pass_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      shared.places().k[k_at.stage].wait_full(k_at.parity);
      shared.places().k[k_at.stage].release();
      k_at.advance();
      take_turn();
      pass_turn();
      shared.places().v[v_at.stage].wait_full(v_at.parity);
      shared.places().v[v_at.stage].release();
      v_at.advance();
    }
  }

  // s, of a block of keys, becomes weights. kWhole: every row sees all of these keys.
  template <bool kFirst, bool kWhole>
  FX_DEVICE void weigh(typename Config::Scores& s, typename Config::Weights& weights,
                       typename Config::Output& o, Softmax<T>& softmax,
                       const typename Config::Mask& mask, const FwdTask& task, const KeyBlocks& own,
                       int row0, int block) {
    const int kv0 = block * kBlockKV;
    if constexpr (Config::kGeneral) {
      apply_options(s, p, task, row0, kv0);
      if (p.mask.data) mask.add_to(s, kv0);
    }
    if constexpr (!kWhole)
      if (block < own.whole_begin || block >= own.whole_end) hide_unseen(s, task, row0, kv0);
    softmax.template step<kFirst>(s, weights, o, scale, [&](auto& atom, int n) {
      if constexpr (Config::kDropout) Dropout<T>(p, task).apply(atom, row0, kv0 + n * kAtom);
    });
  }

  FX_DEVICE void all_blocks(const FwdTask& task, const KeyBlocks& own, int row0,
                            typename Config::QTile q, Place& q_place, typename Config::Output& o,
                            Softmax<T>& softmax) {
    typename Config::Scores s;
    typename Config::Weights weights;
    typename Config::Mask mask(p, task, row0);
    const auto fetch_mask = [&](int block) {
      if constexpr (Config::kGeneral)
        if (p.mask.data) mask.fetch(block * kBlockKV);
    };
    int block = own.block_begin;
    shared.places().k[k_at.stage].wait_full(k_at.parity);
    take_turn();
    start_scores(s, q);
    pass_turn();
    fetch_mask(block);
    wgmma_wait<0>();
    scores_arrived(s);
    if (block + 1 == own.block_end) q_place.release();
    weigh<true, false>(s, weights, o, softmax, mask, task, own, row0, block);

    // The output of each block is computed together with the scores of the next one. whole: every
    // row sees all of these blocks.
    const auto blocks_to = [&](int end, auto whole) {
#pragma unroll 1
      for (++block; block < end; ++block) {
        shared.places().k[k_at.stage].wait_full(k_at.parity);
        shared.places().v[v_at.stage].wait_full(v_at.parity);
        take_turn();
        start_output(o, weights);
        start_scores(s, q);
        pass_turn();
        fetch_mask(block);
        wgmma_wait<0>();
        output_arrived(o);
        scores_arrived(s);
        if (block + 1 == own.block_end) q_place.release();  // for the next tile's
        weigh<false, decltype(whole)::value>(s, weights, o, softmax, mask, task, own, row0, block);
      }
      --block;
    };
    if constexpr (!Config::kGeneral) {  // whose tests are few beside the rest
      blocks_to(std::min(own.whole_begin, own.block_end), std::false_type{});
      blocks_to(std::min(own.whole_end, own.block_end), std::true_type{});
    }
    blocks_to(own.block_end, std::false_type{});

    shared.places().v[v_at.stage].wait_full(v_at.parity);
    if (const int left = task.seq_kv - block * kBlockKV; p.cu_seqlens_k && left < kBlockKV) {
      clear_rows<Config>(shared.v(v_at.stage), left);
      wait_for_warpgroup();  // all rows are clear
    }
    start_output(o, weights);
    wgmma_wait<0>();
    output_arrived(o);
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    fwd_kernel(const __grid_constant__ FwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const Shared<Config> shared{smem};
  if (threadIdx.x == 0) {
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map);
    shared.init();
  }
  __syncthreads();  // the barriers are set up
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<Config::kTile.loader_registers()>();
    if (threadIdx.x == 0) load<Config>(args, shared);
    if (threadIdx.x == kWarpSize) plan<Config>(args, shared);
  } else {
    take_registers<Config::kTile.registers()>();
    Compute<Config>(args, shared, warpgroup - 1).all_tiles();
  }
#endif
}

}  // namespace flash_ext::sm90
