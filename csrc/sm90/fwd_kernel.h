// The forward kernel for Hopper. FlashAttention-3 (arXiv:2407.08608): one warp has the copy engine
// fill a ring of keys and values, and warpgroups of 64 rows each compute. While a warpgroup turns one
// block's scores into weights, the tensor cores compute its next scores and the output of its last
// weights, or another warpgroup's.
#pragma once
#include "../attn/band.h"
#include "../attn/element.h"
#include "fwd_args.h"
#include "fwd_variants.h"
#include "softmax.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace flash_ext::sm90 {

template <DType kDType, int kDim, FwdTile kSize = fwd_tile(kDim)>
struct FwdConfig {
  using T = Element<kDType>;
  static constexpr FwdTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kStages = kTile.stages, kQStages = kTile.q_stages;
  static constexpr int kWarpgroups = kTile.warpgroups, kThreads = (kWarpgroups + 1) * kWarpgroup;
  static constexpr int kBlockQ = kWarpgroups * 64, kBlockKV = kTile.block_kv;

  using QTile = SwizzledTile<T, 64, kHeadDim>;  // of a warpgroup
  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using Scores = AccTile<T, 16, kBlockKV>;
  using Weights = OperandTile<T, 16, kBlockKV>;
  using Output = AccTile<T, 16, kHeadDim>;
};

template <typename Config>
struct Shared {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int kStages = Config::kStages, kWarpgroups = Config::kWarpgroups;
  static constexpr int kQTiles = kWarpgroups * Config::kQStages;
  static constexpr int kTileBytes = kQTiles * QTile::kBytes + 2 * kStages * KvTile::kBytes;
  static constexpr int kPlaces = kQTiles + 2 * kStages;
  static constexpr int kBytes = kTileBytes + kPlaces * static_cast<int>(sizeof(Place));
  unsigned char* base;

  FX_DEVICE Place* places() const { return reinterpret_cast<Place*>(base + kTileBytes); }
  FX_DEVICE Place& q_place(int stage, int warpgroup) const {
    return places()[stage * kWarpgroups + warpgroup];
  }
  FX_DEVICE Place& k_place(int stage) const { return places()[kQTiles + stage]; }
  FX_DEVICE Place& v_place(int stage) const { return places()[kQTiles + kStages + stage]; }

  FX_DEVICE QTile q(int stage, int warpgroup) const {
    return {reinterpret_cast<T*>(base + (stage * kWarpgroups + warpgroup) * QTile::kBytes)};
  }
  FX_DEVICE KvTile k(int stage) const {
    return {reinterpret_cast<T*>(base + kQTiles * QTile::kBytes + stage * KvTile::kBytes)};
  }
  FX_DEVICE KvTile v(int stage) const { return k(kStages + stage); }

  FX_DEVICE void init() const {
    for (int i = 0; i < kPlaces; ++i) places()[i].init(i < kQTiles ? 4 : 4 * kWarpgroups);
    Mbarrier::publish_init();
  }
};

// Calls f with every tile that is this thread block's, the longest ones first. They are dealt to and
// fro, so that nobody always gets the longer ones.
template <typename Config, typename F>
FX_DEVICE void for_each_task(const FwdArgs& args, F f) {
  const unsigned tiles = static_cast<unsigned>(args.heads * args.blocks_q);
  for (unsigned round = 0; round * gridDim.x < tiles; ++round) {
    const unsigned mine = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const unsigned number = round * gridDim.x + mine;
    if (number >= tiles) continue;
    const FwdTask task = fwd_task<Config::kBlockQ, Config::kBlockKV>(args, number);
    if (task.row0 < task.rows) f(task);
  }
}

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load(const FwdArgs& args, Shared<Config> shared) {
  constexpr int kBlockKV = Config::kBlockKV;
  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kQStages> q_at;
  for_each_task<Config>(args, [&](const FwdTask& task) {
    const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
    const int first_key = static_cast<int>(task.first_k);
    const auto load_keys = [&](int block) {
      Place& place = shared.k_place(k_at.stage);
      place.wait_empty(k_at.parity);
      copy_tile(shared.k(k_at.stage), args.k_map,
                {first_key + block * kBlockKV, task.kv_head, batch}, place.full);
      k_at.advance();
    };
    const auto load_values = [&](int block) {
      Place& place = shared.v_place(v_at.stage);
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
    for (int block = task.block_begin + 1; block < task.block_end; ++block) {
      load_keys(block);
      load_values(block - 1);
    }
    if (any) load_values(task.block_end - 1);
  });
}

// Divides by the softmax's denominator, in which the sink takes part, and writes lse.
template <typename Config>
FX_DEVICE void normalise(typename Config::Output& o, Softmax<typename Config::T>& softmax,
                         const AttnParams& p, const FwdTask& task, int row0) {
  softmax.sum.reduce_lanes([](float a, float b) { return a + b; });
  softmax.decay.for_each([&](float& factor, int m, int r) {
    const int row = row0 + o.row(m, r);
    float top = softmax.reference.v[m][r], sum = softmax.sum.v[m][r];
    factor = 1.f;
    if (p.sinks) {
      const float sink = static_cast<const float*>(p.sinks)[task.head] * kLog2e;
      const float both = fmaxf(top, sink);
      factor = fast_exp2(top - both);
      sum = sum * factor + fast_exp2(sink - both);
      top = both;
    }
    factor = sum == 0.f ? 0.f : factor / sum;
    if (row >= task.rows || !o.speaks_for_row()) return;
    const float lse = sum == 0.f ? -INFINITY : top + log2f(sum);
    static_cast<float*>(p.lse)[task.lse_offset(p, row)] = lse * kLn2;
  });
  softmax.rescale(o);
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
// weight of zero would not hide.
template <typename Config>
FX_DEVICE void clear_rows(typename Config::KvTile v, int from, int barrier) {
  constexpr int kChunks = Config::KvTile::kBlocks * kBlockCols / 8;
  for (int i = threadIdx.x % kWarpgroup; i < (Config::kBlockKV - from) * kChunks; i += kWarpgroup)
    *reinterpret_cast<uint4*>(v.at(from + i / kChunks, i % kChunks * 8)) = {0, 0, 0, 0};
  ptx::fence_proxy_async();           // wgmma sees the zeros
  barrier_wait(barrier, kWarpgroup);  // ... of the whole warpgroup
}

// Warpgroup `id` of those that compute.
template <typename Config>
FX_DEVICE void compute(const FwdArgs& args, Shared<Config> shared, int id) {
  constexpr int kBlockKV = Config::kBlockKV, kWarpgroups = Config::kWarpgroups;
  const AttnParams& p = args.params;
  const int warp_row = uniform(static_cast<int>(warp_id()) % 4) * 16;
  // To scores to base 2. Where everything is masked, -inf * scale must not be NaN: a scale of 0 is
  // nearly 0.
  const float scale = fmaxf(static_cast<float>(p.scale) * kLog2e, 1e-37f);
  const int own_barrier = 1 + kWarpgroups + id;
  // Turns: barrier 1 + i is warpgroup i's, which waits there for the one before it.
  const auto take_turn = [&] {
    if constexpr (Config::kTile.take_turns) barrier_wait(1 + id, 2 * kWarpgroup);
  };
  const auto pass_turn = [&] {
    if constexpr (Config::kTile.take_turns)
      barrier_arrive(1 + (id + 1) % kWarpgroups, 2 * kWarpgroup);
  };
  if (id == kWarpgroups - 1) pass_turn();  // the first turn is the first one's

  RingPosition<Config::kStages> k_at, v_at;
  RingPosition<Config::kQStages> q_at;
  for_each_task<Config>(args, [&](const FwdTask& task) {
    const int row0 = task.row0 + 64 * id + warp_row;
    typename Config::Output o;
    o.clear();
    Softmax<typename Config::T> softmax;
    const typename Config::QTile q = shared.q(q_at.stage, id);
    Place& q_place = shared.q_place(q_at.stage, id);
    q_place.wait_full(q_at.parity);
    q_at.advance();

    if (task.block_begin < task.block_end) {
      typename Config::Scores s;
      typename Config::Weights weights;
      constexpr int kByPolynomial = Config::kTile.by_polynomial;
      const auto start_scores = [&] {
        wgmma_fence();
        start_abt<Config::kHeadDim>(s, q, shared.k(k_at.stage));  // s = q k^T
        wgmma_commit();
      };
      const auto scores_arrived = [&] {
        arrived(s);
        shared.k_place(k_at.stage).release();
        k_at.advance();
      };
      const auto start_output = [&] {
        wgmma_fence();
        start_ab(o, weights, shared.v(v_at.stage));  // o += weights v
        wgmma_commit();
      };
      const auto output_arrived = [&] {
        arrived(o);
        shared.v_place(v_at.stage).release();
        v_at.advance();
      };
      const auto round_weights = [&] {
#pragma unroll
        for (int i = 0; i < kBlockKV / 16; ++i)
          weights.atom[0][i] = MmaAtom<typename Config::T>::to_operand(s.atom[0][i]);
      };

      int block = task.block_begin;
      shared.k_place(k_at.stage).wait_full(k_at.parity);
      take_turn();
      start_scores();
      pass_turn();
      wgmma_wait<0>();
      scores_arrived();
      if (block < task.whole_begin || block >= task.whole_end)
        apply_band(s, task, row0, block * kBlockKV);
      softmax.template weigh<0>(s, scale);
      round_weights();

      // The scores of each block are computed together with the output of the one before it.
      const auto blocks_to = [&](int end, auto whole) {
        constexpr bool kWhole = decltype(whole)::value;
#pragma unroll 1
        for (++block; block < end; ++block) {
          shared.k_place(k_at.stage).wait_full(k_at.parity);
          if constexpr (Config::kTile.early) {
            take_turn();
            start_scores();
            shared.v_place(v_at.stage).wait_full(v_at.parity);
            start_output();
            pass_turn();
            wgmma_wait<1>();
            scores_arrived();
            if constexpr (!kWhole) apply_band(s, task, row0, block * kBlockKV);
            const bool grown = softmax.template weigh<kWhole ? kByPolynomial : 0>(s, scale);
            wgmma_wait<0>();
            output_arrived();
            if (grown) softmax.rescale(o);
            round_weights();
          } else {
            shared.v_place(v_at.stage).wait_full(v_at.parity);
            take_turn();
            start_output();
            start_scores();
            pass_turn();
            wgmma_wait<0>();
            output_arrived();
            scores_arrived();
            if constexpr (!kWhole) apply_band(s, task, row0, block * kBlockKV);
            softmax.template weigh_boldly<kWhole ? kByPolynomial : 0>(s, weights, o, scale);
          }
        }
        --block;
      };
      blocks_to(std::min(task.whole_begin, task.block_end), std::false_type{});
      blocks_to(std::min(task.whole_end, task.block_end), std::true_type{});
      blocks_to(task.block_end, std::false_type{});

      shared.v_place(v_at.stage).wait_full(v_at.parity);
      const int left = task.seq_kv - block * kBlockKV;
      if (p.cu_seqlens_k && left < kBlockKV)
        clear_rows<Config>(shared.v(v_at.stage), left, own_barrier);
      start_output();
      wgmma_wait<0>();
      output_arrived();
    }
    normalise<Config>(o, softmax, p, task, row0);
    barrier_wait(own_barrier, kWarpgroup);  // the whole warpgroup has read q
    write_output<Config>(o, q, p, task, row0, warp_row);
    q_place.release();
  });
}

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
    give_registers_away<Config::kTile.producer_registers()>();
    if (threadIdx.x == 0) load<Config>(args, shared);
  } else {
    take_registers<Config::kTile.registers()>();
    compute<Config>(args, shared, warpgroup - 1);
  }
#endif
}

}  // namespace flash_ext::sm90
