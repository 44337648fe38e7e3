// dq of wide heads on Hopper: a kernel of its own, which computes the gradients of scores once more, so that
// there are seven products a block of scores instead of five. Were dq a by-product of dk and dv, sums in
// global memory would be added to for each 64 keys, and the L2 cache would be the bound. So it stays in
// registers, no sum is shared, and results repeat bit for bit. Two warpgroups own 64 query rows each;
// blocks of keys pass by.
#pragma once
#include "../attn/bwd_task.h"
#include "../attn/element.h"
#include "../attn/fwd_task.h"
#include "../attn/online_softmax.h"
#include "../attn/scores.h"
#include "bwd_args.h"
#include "bwd_kernel.h"
#include "bwd_wide_variants.h"
#include "write_rows.h"

namespace flash_ext::sm90 {

template <DType kDType, int kDim, Options kWith = Options::none,
          DqTile kSize = dq_tile(kDim, kWith)>
struct DqConfig {
  using T = Element<kDType>;
  static constexpr bool kGeneral = kWith != Options::none, kDropout = kWith == Options::dropout;
  static constexpr DqTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kWarpgroups = kTile.warpgroups, kThreads = (kWarpgroups + 1) * kWarpgroup;
  static constexpr int kKStages = kTile.k_stages, kVStages = kTile.v_stages;

  using QTile = SwizzledTile<T, 64, kHeadDim>;
  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using Scores = AccTile<T, 16, kBlockKV>;
  using Gradients = OperandTile<T, 16, kBlockKV>;
  using Dq = AccTile<T, 16, kHeadDim>;
  using Mask = std::conditional_t<kGeneral, MaskBlock<T, 16, kBlockKV>, NoMask>;
};

struct DqTask : RowGroup, KeyBlocks {
  int64_t first_row;  // of the group, in BwdArgs::stats
  int row0;           // the block's first row
};

// The index-th of batch * heads_q * row blocks: those that see the last keys come first.
template <int kBlockQ, int kBlockKV, bool kMasked>
FX_DEVICE DqTask dq_task(const BwdArgs& args, unsigned index) {
  const unsigned heads = static_cast<unsigned>(args.heads_of_group);
  const auto [block, group] =
      block_of_group(index, args.blocks_q, args.groups * heads, args.groups_at_once * heads);
  const RowGroup rows = row_group(args.params, group, args.pack);
  DqTask t{rows,
           {},
           args.first_row(rows.batch, rows.head, rows.first_q),
           (args.blocks_q - 1 - block) * kBlockQ};
  if (t.row0 < t.rows)
    static_cast<KeyBlocks&>(t) =
        key_blocks<kBlockKV, kMasked>(t, t.row0, std::min(t.row0 + kBlockQ, t.rows), args.seen);
  return t;
}

template <typename Config>
struct DqShared {
  using T = typename Config::T;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int kGradO = Config::kWarpgroups * QTile::kBytes, kK = 2 * kGradO;
  static constexpr int kV = kK + Config::kKStages * KvTile::kBytes;
  static constexpr int kRest = kV + Config::kVStages * KvTile::kBytes;
  struct Rest {
    Place k[Config::kKStages], v[Config::kVStages];
    Mbarrier q[Config::kWarpgroups], grad_o[Config::kWarpgroups];
    DqTask task;
  };
  static constexpr int kBytes = kRest + static_cast<int>(sizeof(Rest));
  unsigned char* base;

  FX_DEVICE Rest& rest() const { return *reinterpret_cast<Rest*>(base + kRest); }
  FX_DEVICE QTile q(int i) const { return {reinterpret_cast<T*>(base + i * QTile::kBytes)}; }
  FX_DEVICE QTile grad_o(int i) const {
    return {reinterpret_cast<T*>(base + kGradO + i * QTile::kBytes)};
  }
  FX_DEVICE KvTile k(int stage) const {
    return {reinterpret_cast<T*>(base + kK + stage * KvTile::kBytes)};
  }
  FX_DEVICE KvTile v(int stage) const {
    return {reinterpret_cast<T*>(base + kV + stage * KvTile::kBytes)};
  }

  FX_DEVICE void init() const {
    constexpr int kWarps = Config::kWarpgroups * kWarpgroup / kWarpSize;
    for (Place& place : rest().k) place.init(kWarps);
    for (Place& place : rest().v) place.init(kWarps);
    for (Mbarrier& q : rest().q) q.init(1);
    for (Mbarrier& grad_o : rest().grad_o) grad_o.init(1);
    Mbarrier::publish_init();
  }
};

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load_for_dq(const BwdArgs& args, const DqTask& task, DqShared<Config> shared) {
  auto& rest = shared.rest();
  const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
  const auto keys_at = [&](int block) {
    return Corner{static_cast<int>(task.first_k) + block * Config::kBlockKV, task.kv_head, batch};
  };
  const auto rows_at = [&](int i) {
    return Corner{static_cast<int>(task.first_q) + task.row0 + 64 * i, task.head, batch};
  };
  RingPosition<Config::kKStages> k_at;
  RingPosition<Config::kVStages> v_at;
  const auto load_keys = [&](int block) {
    Place& place = rest.k[k_at.stage];
    place.wait_empty(k_at.parity);
    copy_tile(shared.k(k_at.stage), args.k_map, keys_at(block), place.full);
    k_at.advance();
  };
  load_keys(task.block_begin);
  for (int i = 0; i < Config::kWarpgroups; ++i)
    copy_tile(shared.q(i), args.q_map, rows_at(i), rest.q[i]);
  for (int i = 0; i < Config::kWarpgroups; ++i)
    copy_tile(shared.grad_o(i), args.grad_o_map, rows_at(i), rest.grad_o[i]);
#pragma unroll 1
  for (int block = task.block_begin; block < task.block_end; ++block) {
    Place& place = rest.v[v_at.stage];
    place.wait_empty(v_at.parity);
    copy_tile(shared.v(v_at.stage), args.v_map, keys_at(block), place.full);
    v_at.advance();
    if (block + 1 < task.block_end) load_keys(block + 1);
  }
}

// Warpgroup `id` of those that compute.
template <typename Config>
class DqCompute {
  using T = typename Config::T;
  using Scores = typename Config::Scores;
  using Gradients = typename Config::Gradients;
  using Dq = typename Config::Dq;
  static constexpr int kBlockKV = Config::kBlockKV, kHeadDim = Config::kHeadDim;

 public:
  FX_DEVICE DqCompute(const BwdArgs& args, const DqTask& task, DqShared<Config> shared, int id)
      : args(args), p(args.params), task(task), shared(shared), rest(shared.rest()), id(id),
        row0(task.row0 + 64 * id), warp_row(uniform(static_cast<int>(warp_id()) % 4) * 16),
        scale((Config::kGeneral ? 1.f : static_cast<float>(p.scale)) * kLog2e) {}

  FX_DEVICE void run() {
    Dq dq;
    dq.clear();
    KeyBlocks own;  // the blocks that these rows see
    if (row0 < task.rows)
      own = key_blocks<kBlockKV, Config::kGeneral>(task, row0, std::min(row0 + 64, task.rows),
                                                   Config::kGeneral ? args.seen : SeenKeys{});
    if (task.block_begin < task.block_end) rest.q[id].wait(0);
    int passed = task.block_begin;
    if (own.block_begin < own.block_end) {
      pass_blocks(own.block_begin - passed);
      all_blocks(dq, own);
      passed = own.block_end;
    } else if (task.block_begin < task.block_end) {
      rest.grad_o[id].wait(0);  // shared memory is written until then
    }
    pass_blocks(task.block_end - passed);

    dq.for_each([&](float& x, int, int, int) { x *= static_cast<float>(p.scale); });
    wait_for_warpgroup();  // nobody reads q any more
    const int row = row0 + warp_row;
    write_rows(dq, shared.q(id), warp_row,
               static_cast<T*>(p.dq.data) + task.first_offset(p.dq) + row * p.dq.seq_stride,
               p.dq.seq_stride, task.rows - row, static_cast<int>(p.head_dim));
  }

 private:
  const BwdArgs& args;
  const AttnBwdParams& p;
  const DqTask& task;
  const DqShared<Config> shared;
  typename DqShared<Config>::Rest& rest;
  const int id, row0, warp_row;
  const float scale;
  RingPosition<Config::kKStages> k_at, next_k;
  RingPosition<Config::kVStages> v_at;

  FX_DEVICE void wait_for_warpgroup() { barrier_wait(1 + id, kWarpgroup); }

  // Blocks that only the other warpgroup needs.
  FX_DEVICE void pass_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      rest.k[k_at.stage].wait_full(k_at.parity);
      rest.k[k_at.stage].release();
      k_at.advance();
      rest.v[v_at.stage].wait_full(v_at.parity);
      rest.v[v_at.stage].release();
      v_at.advance();
    }
    next_k = k_at;
  }

  // What follows a packed sequence's last key may be NaN, which a weight of zero would not hide. Every
  // warpgroup does it before its own products.
  FX_DEVICE void clear_tail(typename Config::KvTile tile, int block) {
    const int left = task.seq_kv - block * kBlockKV;
    if (!p.cu_seqlens_k || left >= kBlockKV) return;
    clear_rows(tile, left, kBlockKV, threadIdx.x % kWarpgroup, kWarpgroup);
    wait_for_warpgroup();  // all rows are clear
  }
  FX_DEVICE void start_scores(Scores& s, int block) {
    rest.k[next_k.stage].wait_full(next_k.parity);
    clear_tail(shared.k(next_k.stage), block);
    wgmma_fence();
    start_abt<kHeadDim>(s, shared.q(id), shared.k(next_k.stage));  // s = q k^T
    wgmma_commit();
    next_k.advance();
  }
  FX_DEVICE void start_gradients(Scores& dp, int block) {
    rest.v[v_at.stage].wait_full(v_at.parity);
    clear_tail(shared.v(v_at.stage), block);
    wgmma_fence();
    start_abt<kHeadDim>(dp, shared.grad_o(id), shared.v(v_at.stage));  // dp = grad_o v^T
    wgmma_commit();
  }
  FX_DEVICE void start_dq(Dq& dq, const Gradients& ds) {
    wgmma_fence();
    start_ab(dq, ds, shared.k(k_at.stage));  // dq += ds k
    wgmma_commit();
  }

  // Softcap's slopes where a block's scores are, two neighbours together in half precision.
  struct Slopes {
    uint32_t pair[kBlockKV / 4];
  };

  // Products become scores under the options.
  FX_DEVICE void apply(Scores& s, Slopes& slopes, const typename Config::Mask& mask,
                       const RowGroup& group, int block) const {
    scale_scores(s, p);
    if (p.softcap > 0) {
      const float inverse = fast_reciprocal(static_cast<float>(p.softcap));
      Scores::for_each_pair([&](int j, int, int, int) {
        const float x = s.pair(j)[0] * inverse, y = s.pair(j)[1] * inverse;
        slopes.pair[j] = ptx::cvt<half_t>(1.f - x * x, 1.f - y * y);
      });
    }
    add_alibi(s, p, group, row0 + warp_row, block * kBlockKV);
    if (p.mask.data) mask.add_to(s, block * kBlockKV);
  }

  // Scores become weights.
  FX_DEVICE void weigh(Scores& s, const float (&lse)[2], const KeyBlocks& own, int block) {
    s.for_each([&](float& x, int, int slot, int) { x = fast_exp2(fmaf(x, scale, -lse[slot])); });
    // The mask's gradient needs that rows that are not there weigh nothing, even where they are NaN.
    const bool all_there = !Config::kGeneral || row0 + 64 <= task.rows;
    if (block >= own.whole_begin && block < own.whole_end && all_there) return;
    int begin[2], end[2];  // the keys that a row sees
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int query = row0 + warp_row + s.row(0, slot), key0 = block * kBlockKV;
      begin[slot] = query - task.left - key0;
      end[slot] = std::min(query + task.right + 1, task.seq_kv) - key0;
      if (Config::kGeneral && query >= task.rows) end[slot] = begin[slot];
    }
    s.for_each([&](float& x, int, int slot, int col) {
      x = col >= begin[slot] && col < end[slot] ? x : 0.f;
    });
  }

  // Adds the gradients of a block's scores after softcap to those of the mask. Only this kernel does: it
  // has the weights as they are, not rounded.
  FX_DEVICE void add_to_dmask(const Scores& weights, const Scores& grads, int block) const {
    const int row = row0 + warp_row + Scores::row(0, 0);
    const int key = block * kBlockKV + Scores::first_col();
    float* first = static_cast<float*>(p.dmask) + task.batch * p.dmask_batch_stride +
                   task.head * p.dmask_head_stride + row * p.dmask_q_stride +
                   key * p.dmask_kv_stride;
    const int eight_rows = 8 * static_cast<int>(p.dmask_q_stride);
    const int next_key = static_cast<int>(p.dmask_kv_stride);
#pragma unroll
    for (int n = 0; n < kBlockKV / 16; ++n)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int offset = i / 2 % 2 * eight_rows + (16 * n + i / 4 * 8 + i % 2) * next_key;
        add_where(weights.atom[0][n].reg[i], first + offset, grads.atom[0][n].reg[i]);
      }
  }

  // dp becomes the gradients of products, before their scale.
  FX_DEVICE void differentiate(Scores& dp, Scores& weights, const float (&delta)[2],
                               const Slopes& slopes, const RowGroup& group, int block) const {
    if constexpr (Config::kDropout) {
      Dropout<T>(p, group).apply(dp, row0 + warp_row, block * kBlockKV);
      const float factor = 65536.f / (65536.f - static_cast<float>(p.dropout_threshold));
      dp.for_each([&](float& x, int, int, int) { x *= factor; });
    }
    dp.for_each(weights, [&](float& x, float weight, int, int slot, int) {
      x = weight * (x - delta[slot]);
    });
    if constexpr (Config::kGeneral) {
      if (p.dmask) add_to_dmask(weights, dp, block);
      if (p.softcap > 0)
        Scores::for_each_pair([&](int j, int, int, int) {
          const float2 slope = widened<half_t>(slopes.pair[j]);
          dp.pair(j)[0] *= slope.x, dp.pair(j)[1] *= slope.y;
        });
    }
  }

  FX_DEVICE void all_blocks(Dq& dq, const KeyBlocks& own) {
    RowGroup group = task;
    group.pack = Divisor{};  // heads are not packed here, and now the compiler knows
    typename Config::Mask mask(p, group, row0 + warp_row);
    const auto fetch_mask = [&](int block) {
      if constexpr (Config::kGeneral)
        if (p.mask.data) mask.fetch(block * kBlockKV);
    };
    Slopes slopes;
    Scores s, dp;
    Gradients ds;
    float lse[2], delta[2];
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int row = row0 + warp_row + s.row(0, slot);
      const RowStats x =
          row < task.rows ? args.stats[task.first_row + row] : RowStats{INFINITY, 0.f};
      lse[slot] = x.lse, delta[slot] = x.delta;
    }
    int block = own.block_begin;
    start_scores(s, block);
    fetch_mask(block);
    rest.grad_o[id].wait(0);
    start_gradients(dp, block);
    wgmma_wait<1>();
#pragma unroll 1
    for (;;) {
      arrived(s);
      if constexpr (Config::kGeneral) apply(s, slopes, mask, group, block);
      weigh(s, lse, own, block);
      wgmma_wait<0>();
      arrived(dp);
      rest.v[v_at.stage].release();
      v_at.advance();
      differentiate(dp, s, delta, slopes, group, block);
#pragma unroll
      for (int n = 0; n < kBlockKV / 16; ++n) ds.atom[0][n] = MmaAtom<T>::to_operand(dp.atom[0][n]);
      start_dq(dq, ds);
      if (++block == own.block_end) break;
      start_scores(s, block);
      fetch_mask(block);
      wgmma_wait<1>();
      arrived(dq);
      rest.k[k_at.stage].release();
      k_at.advance();
      start_gradients(dp, block);
      wgmma_wait<1>();
    }
    wgmma_wait<0>();
    arrived(dq);
    rest.k[k_at.stage].release();
    k_at.advance();
  }
};

// The index-th thread block.
template <typename Config>
FX_DEVICE void dq_block(const BwdArgs& args, unsigned index, unsigned char* smem) {
  const DqShared<Config> shared{smem};
  DqTask& task = shared.rest().task;
  if (threadIdx.x == 0) {
    task = dq_task<Config::kBlockQ, Config::kBlockKV, Config::kGeneral>(args, index);
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map), prefetch(args.grad_o_map);
    shared.init();
  }
  __syncthreads();                     // the task is there, and the barriers are set up
  if (task.row0 >= task.rows) return;  // this sequence is shorter than the longest
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<kWideLoaderRegisters>();
    if (threadIdx.x == 0 && task.block_begin < task.block_end)
      load_for_dq<Config>(args, task, shared);
  } else {
    take_registers<kWideRegisters>();
    DqCompute<Config>(args, task, shared, warpgroup - 1).run();
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    dq_kernel(const __grid_constant__ BwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  dq_block<Config>(args, blockIdx.x, smem);
#endif
}

}  // namespace flash_ext::sm90
