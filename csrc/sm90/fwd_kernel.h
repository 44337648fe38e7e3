// The forward kernel for Hopper. FlashAttention-3 (arXiv:2407.08608): one warp has the copy engine
// fill a ring of keys and values, and warpgroups of 64 rows each compute. While a warpgroup turns one
// block's scores into weights, the tensor cores multiply for another one.
#pragma once
#include "../attn/band.h"
#include "../attn/element.h"
#include "../attn/scores.h"
#include "fwd_args.h"
#include "fwd_variants.h"
#include "softmax.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace flash_ext::sm90 {

template <DType kDType, int kDim, FwdOptions kWith = FwdOptions::none,
          FwdTile kSize = fwd_tile(kDim, kWith)>
struct FwdConfig {
  using T = Element<kDType>;
  static constexpr bool kGeneral = kWith != FwdOptions::none;
  static constexpr bool kDropout = kWith == FwdOptions::dropout;
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

inline constexpr int kNumbers = 2;  // tiles that the loading warp may be ahead

template <typename Config>
struct Shared {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int kStages = Config::kStages, kWarpgroups = Config::kWarpgroups;
  static constexpr int kQTiles = kWarpgroups * Config::kQStages;
  static constexpr int kTileBytes = kQTiles * QTile::kBytes + 2 * kStages * KvTile::kBytes;
  struct Places {
    Place q[kQTiles], k[kStages], v[kStages], number[kNumbers];
    unsigned numbers[kNumbers];
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
    for (Place& place : places().number) place.init(kWarps * kWarpgroups);
    Mbarrier::publish_init();
  }
};

// Which tiles are this thread block's. They come with the longest ones first; each block takes the
// next one when it is done, or they are dealt to and fro, so that nobody always gets the longer ones.
class TakeTiles {
 public:
  FX_DEVICE explicit TakeTiles(unsigned* taken) : taken(taken) {}
  FX_DEVICE unsigned next() {
    ++round;
    if (taken && round > 0) return gridDim.x + atomicAdd(taken, 1u);
    return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
  }

 private:
  unsigned* taken;
  int round = -1;
};

FX_DEVICE unsigned tiles_of(const FwdArgs& args) {
  return static_cast<unsigned>(args.heads * args.blocks_q);
}

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load(const FwdArgs& args, Shared<Config> shared) {
  constexpr int kBlockKV = Config::kBlockKV;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kQStages> q_at;
  RingPosition<kNumbers> number_at;
  const auto tell = [&](unsigned number) {
    Place& place = shared.places().number[number_at.stage];
    place.wait_empty(number_at.parity);
    shared.places().numbers[number_at.stage] = number;
    place.full.arrive();
    number_at.advance();
  };
  const auto load_tile = [&](const FwdTask& task) {
    const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
    const int first_key = static_cast<int>(task.first_k);
    const auto load_keys = [&](int block) {
      Place& place = shared.places().k[k_at.stage];
      place.wait_empty(k_at.parity);
      copy_tile(shared.k(k_at.stage), args.k_map,
                {first_key + block * kBlockKV, task.kv_head, batch}, place.full);
      k_at.advance();
    };
    const auto load_values = [&](int block) {
      Place& place = shared.places().v[v_at.stage];
      place.wait_empty(v_at.parity);
      copy_tile(shared.v(v_at.stage), args.v_map,
                {first_key + block * kBlockKV, task.kv_head, batch}, place.full);
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
#pragma unroll 1
    for (int block = task.block_begin + 1; block < task.block_end; ++block) {
      load_keys(block);
      load_values(block - 1);
    }
    if (any) load_values(task.block_end - 1);
  };
  const unsigned tiles = tiles_of(args);
  TakeTiles take(args.taken);
  for (unsigned number = take.next(); number < tiles;) {
    tell(number);
    const unsigned next = take.next();  // known by the time that it is needed
    const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV, Config::kGeneral>(args, number);
    if (task.row0 < task.rows) load_tile(task);
    number = next;
  }
  tell(tiles);
}

// Divides by the softmax's denominator, in which the sink takes part, and writes lse.
template <typename Config>
FX_DEVICE void normalise(typename Config::Output& o, Softmax<typename Config::T>& softmax,
                         const AttnParams& p, const FwdTask& task, int row0) {
  softmax.sum.reduce_lanes([](float a, float b) { return a + b; });
  RowVec<typename Config::T, 16> factor;
  factor.for_each([&](float& x, int m, int r) {
    const int row = row0 + o.row(m, r);
    Denominator all{softmax.reference.v[m][r], softmax.sum.v[m][r]};
    if (p.sinks) all.add_sink(static_cast<const float*>(p.sinks)[task.head] * kLog2e);
    x = all.reciprocal();
    if constexpr (Config::kDropout) x *= 65536.f / (65536.f - p.dropout_threshold);
    if (row >= task.rows || !o.speaks_for_row()) return;
    const float lse = all.sum == 0.f ? -INFINITY : all.top + log2f(all.sum);
    static_cast<float*>(p.lse)[task.lse_offset(p, row)] = lse * kLn2;
  });
  softmax.multiply(o, factor);
}

// Writes a warp's 16 rows of o through those of q, which are not needed any more.
template <typename Config>
FX_DEVICE void write_output(const typename Config::Output& o, typename Config::QTile q,
                            const AttnParams& p, const FwdTask& task, int row0, int warp_row) {
  using T = typename Config::T;
  constexpr int kChunks = Config::kHeadDim / 8;
  o.store(q, warp_row);
  __syncwarp();  // the 16 rows are there
  T* out = static_cast<T*>(p.o.data) + task.offset(p.o, row0);
#pragma unroll 4
  for (int i = lane_id(); i < 16 * kChunks; i += kWarpSize) {
    const int row = i / kChunks, col = i % kChunks * 8;
    if (row0 + row < task.rows && col < p.head_dim_v)
      *reinterpret_cast<uint4*>(out + row * p.o.seq_stride + col) =
          *reinterpret_cast<const uint4*>(q.at(warp_row + row, col));
  }
  ptx::fence_proxy_async();  // the copy engine may write q after what this thread did there
  __syncwarp();              // ... and all lanes
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
    RingPosition<kNumbers> number_at;
    for (;;) {
      Place& place = shared.places().number[number_at.stage];
      place.wait_full(number_at.parity);
      unsigned number = 0;
      if (lane_id() == 0) number = shared.places().numbers[number_at.stage];
      place.release();
      number = uniform(number);
      number_at.advance();
      if (number >= tiles_of(args)) return;
      const FwdTask task = fwd_task<Config::kBlockQ, kBlockKV, Config::kGeneral>(args, number);
      if (task.row0 < task.rows) tile(task);
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

  // One warpgroup after the other issues products, so that its weights are computed while those of
  // the others run. Barrier 1 + i is warpgroup i's, which waits there for the one before it.
  FX_DEVICE void take_turn() { barrier_wait(1 + id, 2 * kWarpgroup); }
  FX_DEVICE void pass_turn() { barrier_arrive(1 + (id + 1) % kWarpgroups, 2 * kWarpgroup); }
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
    const int row0 = task.row0 + 64 * id + warp_row;
    const typename Config::QTile q = shared.q(q_at.stage, id);
    Place& q_place = shared.q_place(q_at.stage, id);
    q_place.wait_full(q_at.parity);
    q_at.advance();

    typename Config::Output o;
    o.clear();
    Softmax<T> softmax;
    if (task.block_begin < task.block_end) all_blocks(task, row0, q, o, softmax);

    normalise<Config>(o, softmax, p, task, row0);
    wait_for_warpgroup();  // all of it has read q
    write_output<Config>(o, q, p, task, row0, warp_row);
    q_place.release();
  }

  // s, of the keys from kv0 on, becomes weights. kWhole: every row sees all of these keys.
  template <bool kFirst, bool kWhole>
  FX_DEVICE void weigh(typename Config::Scores& s, typename Config::Weights& weights,
                       typename Config::Output& o, Softmax<T>& softmax,
                       const typename Config::Mask& mask, const FwdTask& task, int row0, int kv0) {
    if constexpr (Config::kGeneral) {
      apply_options(s, p, task, row0, kv0);
      if (p.mask.data) mask.add_to(s, kv0);
    }
    if constexpr (!kWhole) {
      const int block = kv0 / kBlockKV;
      if (block < task.whole_begin || block >= task.whole_end) apply_band(s, task, row0, kv0);
    }
    softmax.template step<kFirst>(s, weights, o, scale, [&](auto& atom, int n) {
      if constexpr (Config::kDropout) Dropout<T>(p, task).apply(atom, row0, kv0 + n * kAtom);
    });
  }

  FX_DEVICE void all_blocks(const FwdTask& task, int row0, typename Config::QTile q,
                            typename Config::Output& o, Softmax<T>& softmax) {
    typename Config::Scores s;
    typename Config::Weights weights;
    typename Config::Mask mask(p, task, row0);
    const auto fetch_mask = [&](int block) {
      if constexpr (Config::kGeneral)
        if (p.mask.data) mask.fetch(block * kBlockKV);
    };
    int block = task.block_begin;
    shared.places().k[k_at.stage].wait_full(k_at.parity);
    take_turn();
    start_scores(s, q);
    pass_turn();
    fetch_mask(block);
    wgmma_wait<0>();
    scores_arrived(s);
    weigh<true, false>(s, weights, o, softmax, mask, task, row0, block * kBlockKV);

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
        constexpr bool kWhole = decltype(whole)::value;
        weigh<false, kWhole>(s, weights, o, softmax, mask, task, row0, block * kBlockKV);
      }
      --block;
    };
    if constexpr (!Config::kGeneral) {  // whose tests are few beside the rest
      blocks_to(std::min(task.whole_begin, task.block_end), std::false_type{});
      blocks_to(std::min(task.whole_end, task.block_end), std::true_type{});
    }
    blocks_to(task.block_end, std::false_type{});

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
  } else {
    take_registers<Config::kTile.registers()>();
    Compute<Config>(args, shared, warpgroup - 1).all_tiles();
  }
#endif
}

}  // namespace flash_ext::sm90
