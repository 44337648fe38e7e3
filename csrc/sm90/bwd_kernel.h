// The main backward kernel for Hopper: dk, dv and the float32 sums of dq, as attn/bwd_kernel.h has
// them. Two warpgroups own 64 keys each, and query rows pass by in blocks; the scores are transposed,
// [keys, rows], so that weights and their gradients are the left operands of dv and dk where they are,
// in registers. dq, whose sum goes over the keys of both, needs the gradients in shared memory. Of the
// other four warps one has the copy engine fill rings of q and grad_o, one puts what must be known of
// rows beside them, and two have the engine add the warpgroups' parts of dq to its sums.
#pragma once
#include "../attn/bwd_task.h"
#include "../attn/element.h"
#include "../attn/online_softmax.h"
#include "../tile/atomic.h"
#include "bwd_args.h"
#include "bwd_scores.h"
#include "bwd_variants.h"
#include "operand_store.h"
#include "tma.h"
#include "warpgroup.h"
#include "wgmma.h"

namespace flash_ext::sm90 {

// What must be known of a block of rows, see RowStats.
template <int kRows>
struct BlockStats {
  float lse[kRows], delta[kRows];
};

template <DType kDType, int kDim, Options kWith = Options::none,
          BwdTile kSize = bwd_tile(kDim, kWith)>
struct BwdConfig {
  using T = Element<kDType>;
  static constexpr bool kGeneral = kWith != Options::none, kDropout = kWith == Options::dropout;
  static constexpr BwdTile kTile = kSize;
  static constexpr int kHeadDim = kDim, kBlockQ = kTile.block_q, kBlockKV = kTile.block_kv;
  static constexpr int kWarpgroups = kTile.warpgroups, kThreads = (kWarpgroups + 1) * kWarpgroup;
  static constexpr int kQStages = kTile.q_stages, kGradStages = kTile.grad_stages;
  // The warpgroups divide dq's rows where a block has 64 for each, else its columns: 64 of them and the
  // rest.
  static constexpr bool kDqByRows = kBlockQ == 64 * kWarpgroups;
  static_assert(kDqByRows ? kHeadDim == 64 : kBlockQ == 64 && kHeadDim > 64 && kHeadDim <= 128);
  static constexpr int kLastDqCols = kDqByRows ? 64 : kHeadDim - 64;
  static constexpr int kComputing = kWarpgroups * kWarpgroup;
  // Those who tell that they have read what must be known of rows: a lane of each warp, where the
  // warpgroup meets at a barrier in between, else all lanes.
  static constexpr bool kWarpTells = !kGeneral && !kTile.ds_in_registers;
  static constexpr int kRowReaders = kWarpTells ? kComputing / kWarpSize : kComputing;

  using KvTile = SwizzledTile<T, kBlockKV, kHeadDim>;
  using QTile = SwizzledTile<T, kBlockQ, kHeadDim>;
  using DsTile = SwizzledTile<T, kBlockKV, kBlockQ>;
  using Scores = AccTile<T, 16, kBlockQ>;
  using Weights = OperandTile<T, 16, kBlockQ>;
  using KvGrad = AccTile<T, 16, kHeadDim>;
  using DqPart = AccTile<T, 16, 64>;
  using Stats = BlockStats<kBlockQ>;

  // The rows and columns of the id-th warpgroup's part of a block's dq.
  FX_DEVICE static int dq_row(int id) { return kDqByRows ? 64 * id : 0; }
  FX_DEVICE static int dq_col(int id) { return kDqByRows ? 0 : 64 * id; }
  FX_DEVICE static int dq_cols(int id) { return kLastDqCols == 64 || id == 0 ? 64 : kLastDqCols; }
};

template <typename Config>
using BwdScoresOf = std::conditional_t<Config::kGeneral, BwdScores<Config>, NoBwdScores>;

template <typename Config>
struct BwdShared {
  using T = typename Config::T;
  using KvTile = typename Config::KvTile;
  using QTile = typename Config::QTile;
  using DsTile = typename Config::DsTile;
  using Stats = typename Config::Stats;
  using MaskRows = typename BwdScoresOf<Config>::MaskRows;
  static constexpr int kQ = 2 * KvTile::kBytes, kGradO = kQ + Config::kQStages * QTile::kBytes;
  static constexpr int kDs = kGradO + Config::kGradStages * QTile::kBytes;
  static constexpr int kDq = kDs + 2 * DsTile::kBytes;
  static constexpr int kMask = kDq + Config::kBlockQ * Config::kHeadDim * 4;
  static constexpr int kMaskBytes = Config::kGeneral ? static_cast<int>(sizeof(MaskRows)) : 0;
  static constexpr int kRest = kMask + 4 * Config::kWarpgroups * kMaskBytes;  // of each warp
  struct Rest {
    Stats stats[2];  // like the gradients: of the blocks in turn
    Place q[Config::kQStages], rows[2], grad_o[Config::kGradStages], ds[2], dq[Config::kWarpgroups];
    Mbarrier k, v;
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
  FX_DEVICE DsTile ds(int i) const {
    return {reinterpret_cast<T*>(base + kDs + i * DsTile::kBytes)};
  }
  FX_DEVICE float* dq(int id) const { return reinterpret_cast<float*>(base + kDq) + id * 64 * 64; }

  FX_DEVICE MaskRows& mask(int warp) const {
    return *reinterpret_cast<MaskRows*>(base + kMask + warp * kMaskBytes);
  }

  FX_DEVICE void init() const {
    constexpr int kWarps = Config::kWarpgroups * kWarpgroup / kWarpSize;
    for (Place& place : rest().q) place.init(kWarps);
    for (Place& place : rest().rows) place.init(Config::kRowReaders, kWarpSize);
    for (Place& place : rest().grad_o) place.init(kWarps);
    for (Place& place : rest().ds) place.full.init(kWarps), place.empty.init(kWarps);
    for (Place& place : rest().dq) place.full.init(4), place.empty.init(1);
    rest().k.init(1), rest().v.init(1);
    Mbarrier::publish_init();
  }
};

// By one warp: leaves out the first and the last blocks of rows, if a mask hides all keys from them.
template <typename Config>
FX_DEVICE void leave_out_unseen(const BwdArgs& args, BwdTask& task) {
  const SeenKeys& seen = args.seen;
  const int from = task.block_begin * Config::kBlockQ / kSeenQueries;
  const int to = task.block_end * Config::kBlockQ / kSeenQueries;
  int first = INT32_MAX, last = -1;
  for (int head = 0; head < (seen.head_stride ? args.heads_of_group : 1); ++head) {
    const SeenRange* ranges =
        seen.ranges + task.batch * seen.batch_stride + (task.head + head) * seen.head_stride;
    for (int i = from + static_cast<int>(lane_id()); i < to; i += kWarpSize) {
      const SeenRange range = ranges[std::min(i, seen.blocks - 1)];
      if (range.begin >= task.key0 + Config::kBlockKV || range.end <= task.key0) continue;
      first = std::min(first, i), last = std::max(last, i);
    }
  }
  first = __reduce_min_sync(0xffffffffu, first), last = __reduce_max_sync(0xffffffffu, last);
  if (lane_id() != 0) return;
  constexpr int kPerBlock = Config::kBlockQ / kSeenQueries;
  if (last < 0) task.block_begin = task.block_end = 0;
  else task.block_begin = first / kPerBlock, task.block_end = last / kPerBlock + 1;
}

// The blocks of rows in their order: from the last to the first, each of all heads. So thread blocks
// that take turns follow each other under a causal mask, too, where the first has many more rows.
template <typename F>
FX_DEVICE void for_each_block(const BwdArgs& args, const BwdTask& task, F f) {
#pragma unroll 1
  for (int block = task.block_end - 1; block >= task.block_begin; --block)
#pragma unroll 1
    for (int head = 0; head < args.heads_of_group; ++head) f(head, block);
}

// Index of the first row of the head-th query head, in BwdArgs::stats and dq.
FX_DEVICE int64_t rows_of_head(const AttnParams& p) {
  return p.cu_seqlens_q ? p.lse_head_stride : p.seq_q;
}
FX_DEVICE int64_t first_row_of(const BwdArgs& args, const BwdTask& task, int head) {
  return task.first_row + head * rows_of_head(args.params);
}

// One thread: everything is loaded in the order in which it is used.
template <typename Config>
FX_DEVICE void load(const BwdArgs& args, const BwdTask& task, BwdShared<Config> shared) {
  auto& rest = shared.rest();
  const int batch = args.params.cu_seqlens_q ? 0 : task.batch;
  const Corner keys{static_cast<int>(task.first_k) + task.key0, task.kv_head, batch};
  copy_tile(shared.k(), args.k_map, keys, rest.k);
  bool has_v = false;
  RingPosition<Config::kQStages> q_at;
  RingPosition<Config::kGradStages> grad_at;
  for_each_block(args, task, [&](int head, int block) {
    const Corner rows{static_cast<int>(task.first_q) + block * Config::kBlockQ, task.head + head,
                      batch};
    Place &q = rest.q[q_at.stage], &grad_o = rest.grad_o[grad_at.stage];
    q.wait_empty(q_at.parity);
    copy_tile(shared.q(q_at.stage), args.q_map, rows, q.full);
    if (!has_v) copy_tile(shared.v(), args.v_map, keys, rest.v), has_v = true;
    grad_o.wait_empty(grad_at.parity);
    copy_tile(shared.grad_o(grad_at.stage), args.grad_o_map, rows, grad_o.full);
    q_at.advance(), grad_at.advance();
  });
}

// One warp.
template <typename Config>
FX_DEVICE void load_stats(const BwdArgs& args, const BwdTask& task, BwdShared<Config> shared) {
  constexpr int kAtOnce = 2;  // registers are few here, too
  RingPosition<2> at;
  for_each_block(args, task, [&](int head, int block) {
    const RowStats* first = args.stats + first_row_of(args, task, head) + block * Config::kBlockQ;
    const int rows = task.rows - block * Config::kBlockQ;
    Place& place = shared.rest().rows[at.stage];
    auto& stats = shared.rest().stats[at.stage];
#pragma unroll
    for (int row0 = 0; row0 < Config::kBlockQ; row0 += kAtOnce * kWarpSize) {
      RowStats x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = row0 + i * kWarpSize + static_cast<int>(lane_id());
        x[i] = row < rows ? first[row] : RowStats{INFINITY, 0.f};
      }
      if (row0 == 0) place.wait_empty(at.parity);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = row0 + i * kWarpSize + static_cast<int>(lane_id());
        stats.lse[row] = x[i].lse, stats.delta[row] = x[i].delta;
      }
    }
    place.full.arrive();  // of all lanes: all of it is there
    at.advance();
  });
}

// One thread for each warpgroup: has its part of dq added to the sums, see BwdArgs::dq_paired. In
// deterministic mode blocks of keys take turns, in their order; a thread block only waits for such that
// were started before it.
template <int id, typename Config>
FX_DEVICE void add_dq(const BwdArgs& args, const BwdTask& task, BwdShared<Config> shared) {
  constexpr int kBlockQ = Config::kBlockQ;
  const int cols = Config::dq_cols(id);
  float* panel = args.dq + args.rows * Config::dq_col(id);
  unsigned parity = 0;
  for_each_block(args, task, [&](int head, int block) {
    Place& place = shared.rest().dq[id];
    const int row0 = block * kBlockQ + Config::dq_row(id), rows = std::min(task.rows - row0, 64);
    int* counter = nullptr;
    int turn = 0;
    if (args.turns) {
      const int64_t of_block = (int64_t{task.group} + head) * args.blocks_q + block;
      counter = args.turns + of_block * args.turn_parts + id;
      // All from the first that the block's first row sees come before.
      turn = task.key0 / Config::kBlockKV -
             std::max(block * kBlockQ - task.left, 0) / Config::kBlockKV;
    }
    place.wait_full(parity);
    if (args.turns)
      while (load_acquire(counter) != turn) {}
    if (rows > 0)
      add_async(panel + (first_row_of(args, task, head) + row0) * cols, shared.dq(id), rows * cols);
    wait_add_async_read();
    place.empty.arrive();
    if (args.turns) {
      wait_add_async();
      store_release(counter, turn + 1);
    }
    parity ^= 1;
  });
  wait_add_async();  // shared memory is read until then
}

// Packed tensors: what follows the last row belongs to another sequence, and may be NaN, which a
// weight of zero would not hide. By `count` threads, of which this is the index-th.
template <typename Tile>
FX_DEVICE void clear_rows(Tile tile, int from, int rows, int index, int count) {
  constexpr int kChunks = Tile::kBlocks * kBlockCols / 8;
  for (int i = index; i < (rows - from) * kChunks; i += count)
    *reinterpret_cast<uint4*>(tile.at(from + i / kChunks, i % kChunks * 8)) = {0, 0, 0, 0};
  ptx::fence_proxy_async();  // wgmma sees the zeros after the next barrier
}

// Warpgroup `id` of those that compute.
template <typename Config>
class BwdCompute {
  using T = typename Config::T;
  using Scores = typename Config::Scores;
  using Weights = typename Config::Weights;
  using KvGrad = typename Config::KvGrad;
  using DqPart = typename Config::DqPart;
  static constexpr int kBlockKV = Config::kBlockKV, kBlockQ = Config::kBlockQ;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kComputing = Config::kComputing;

 public:
  FX_DEVICE BwdCompute(const BwdArgs& args, const BwdTask& task, BwdShared<Config> shared, int id)
      : args(args), p(args.params), task(task), shared(shared), rest(shared.rest()), id(id),
        warp_row(uniform(static_cast<int>(warp_id()) % 4) * 16),
        scale(static_cast<float>(p.scale) * kLog2e),
        scores(p, task, shared.mask(4 * id + warp_row / 16), task.key0 + 64 * id + warp_row),
        block(task.block_end - 1),
        tail(p.cu_seqlens_q && task.rows % kBlockQ ? task.rows / kBlockQ : -1) {}

  FX_DEVICE void run() {
    KvGrad dk, dv;
    dk.clear(), dv.clear();
    const int steps = args.heads_of_group * std::max(task.block_end - task.block_begin, 0);
    rest.k.wait(0);
    if (const int left = task.seq_kv - task.key0; p.cu_seqlens_k && left < kBlockKV) {
      if (steps > 0) rest.v.wait(0);
      const int index = static_cast<int>(threadIdx.x) - kWarpgroup;
      clear_rows(shared.k(), left, kBlockKV, index, kComputing);
      clear_rows(shared.v(), left, kBlockKV, index, kComputing);
      all_there();
    }
    if constexpr (Config::kGeneral) {
      if (steps > 0) blocks_with_options(dk, dv, steps);
    } else {
      if (steps > 0) all_blocks(dk, dv, steps);
    }
    dk.for_each([&](float& x, int, int, int) { x *= static_cast<float>(p.scale); });
    if constexpr (Config::kDropout) {
      const float factor = 65536.f / (65536.f - static_cast<float>(p.dropout_threshold));
      dv.for_each([&](float& x, int, int, int) { x *= factor; });
    }
    all_there();  // nobody reads k and v any more
    write(dk, shared.k(), p.dk, static_cast<int>(p.head_dim));
    write(dv, shared.v(), p.dv, static_cast<int>(p.head_dim_v));
  }

 private:
  const BwdArgs& args;
  const AttnBwdParams& p;
  const BwdTask& task;
  const BwdShared<Config> shared;
  typename BwdShared<Config>::Rest& rest;
  const int id, warp_row;
  const float scale;
  BwdScoresOf<Config> scores;
  // Of this block of rows, of the one before and of the next one.
  int block, head = 0, last_head = 0;
  const int tail;  // the block that ends behind a packed sequence's last row
  int step = 0;    // blocks before this one
  RingPosition<Config::kQStages> q_at, next_q;
  int last_q = 0;  // a stage
  RingPosition<Config::kGradStages> grad_at;

  FX_DEVICE void all_there() { barrier_wait(1, kComputing); }
  FX_DEVICE void wait_for_warpgroup() { barrier_wait(2 + id, kWarpgroup); }

  FX_DEVICE void clear_tail(typename Config::QTile tile, int of_block) {
    if (of_block != tail) return;
    clear_rows(tile, task.rows % kBlockQ, kBlockQ, threadIdx.x % kWarpgroup, kWarpgroup);
    wait_for_warpgroup();  // all rows are clear
  }

  // Of the block at next_q.
  FX_DEVICE void start_scores(Scores& s, int of_block) {
    rest.q[next_q.stage].wait_full(next_q.parity);
    clear_tail(shared.q(next_q.stage), of_block);
    wgmma_fence();
    start_abt<kHeadDim>(s, shared.k(), shared.q(next_q.stage), 64 * id);  // s = k q^T
    wgmma_commit();
  }
  FX_DEVICE void start_gradients(Scores& dp) {
    rest.grad_o[grad_at.stage].wait_full(grad_at.parity);
    clear_tail(shared.grad_o(grad_at.stage), block);
    wgmma_fence();
    start_abt<kHeadDim>(dp, shared.v(), shared.grad_o(grad_at.stage), 64 * id);  // v grad_o^T
    wgmma_commit();
  }
  FX_DEVICE void start_dv(KvGrad& dv, const Weights& weights) {
    wgmma_fence();
    start_ab(dv, weights, shared.grad_o(grad_at.stage));  // dv += weights grad_o
    wgmma_commit();
  }
  FX_DEVICE void start_dk(KvGrad& dk, const Weights& ds) {  // dk += ds q
    wgmma_fence();
    if constexpr (Config::kTile.ds_in_registers) start_ab(dk, ds, shared.q(q_at.stage));
    else start_ab(dk, shared.ds(step % 2), 64 * id, shared.q(q_at.stage));
    wgmma_commit();
  }
  FX_DEVICE void start_dq(DqPart& dq, int of_step) {  // dq = ds^T k
    wgmma_fence();
    start_atb(dq, shared.ds(of_step % 2), Config::dq_row(id), shared.k(), Config::dq_col(id));
    wgmma_commit();
  }

  // f(value, atom, register of it, the column's number of `of_column`).
  template <typename F>
  FX_DEVICE static void with_columns(Scores& x, const float* of_column, F f) {
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = 16 * n + 8 * half + static_cast<int>(lane_id() % 4) * 2;
        const float2 y = *reinterpret_cast<const float2*>(of_column + col);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          f(x.atom[0][n].reg[4 * half + i], n, 4 * half + i, i % 2 ? y.y : y.x);
      }
  }

  // Scores become weights.
  FX_DEVICE void weigh(Scores& s) {
    with_columns(s, rest.stats[step % 2].lse,
                 [&](float& x, int, int, float lse) { x = fast_exp2(fmaf(x, scale, -lse)); });
    if (block >= task.whole_begin && block < task.whole_end) return;
    int begin[2], end[2];  // the rows that see a key
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int key = task.key0 + 64 * id + warp_row + s.row(0, slot), row0 = block * kBlockQ;
      begin[slot] = key - task.right - row0;
      end[slot] = key < task.seq_kv ? key + task.left + 1 - row0 : begin[slot];
    }
    s.for_each([&](float& x, int, int slot, int col) {
      x = col >= begin[slot] && col < end[slot] ? x : 0.f;
    });
  }
  FX_DEVICE static void round(const Scores& x, Weights& to) {
#pragma unroll
    for (int n = 0; n < kBlockQ / 16; ++n) to.atom[0][n] = MmaAtom<T>::to_operand(x.atom[0][n]);
  }
  // The gradients of scores, to registers and shared memory.
  FX_DEVICE void differentiate(Scores& dp, const Scores& weights, Weights& ds) {
    with_columns(dp, rest.stats[step % 2].delta, [&](float& x, int n, int i, float delta) {
      x = weights.atom[0][n].reg[i] * (x - delta);
    });
    round(dp, ds);
    store_operand(ds, shared.ds(step % 2), 64 * id + warp_row);
  }

  // Puts a part of dq, of the head last_head, where the copy engine finds it.
  FX_DEVICE void hand_over(const DqPart& dq, int of_step) {
    rest.dq[id].wait_empty(of_step % 2);
    const int dq_cols = Config::dq_cols(id);
    // A lane's rows all are even or all are odd.
    const int row = static_cast<int>(first_row_of(args, task, last_head)) + dq.row(0, 0);
    const int flip = dq_flip(dq_cols) * (row & 1);
    float* first =
        shared.dq(id) + (warp_row + dq.row(0, 0)) * dq_cols + static_cast<int>(lane_id() % 4) * 4;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (Config::kLastDqCols != 64 && 16 * n >= dq_cols) break;
      float* dst = n % 2 ? first - flip : first + flip;
      const float* x = dq.atom[0][n].reg;
      *reinterpret_cast<float4*>(dst + 16 * n) = {x[0], x[1], x[4], x[5]};
      *reinterpret_cast<float4*>(dst + 16 * n + 8 * dq_cols) = {x[2], x[3], x[6], x[7]};
    }
  }
  FX_DEVICE void tell(Mbarrier& there) {
    ptx::fence_proxy_async();  // the copy engine and wgmma see what this warp wrote
    __syncwarp();              // all of it is there
    if (lane_id() == 0) there.arrive();
  }

  // A block, whose scores are there and whose v grad_o^T is under way. Products are issued before what
  // they do not depend on: dv's runs while the scores' gradients are computed (where registers allow),
  // dk's and the next block's two first ones while dq is handed over and the next weights are computed.
  // dq is that of the block before: no warpgroup waits for the other's gradients, and while one computes,
  // products of the other run.
  template <bool kFirst, bool kMore>
  FX_DEVICE void one_block(KvGrad& dk, KvGrad& dv, Scores& s, Scores& dp, DqPart& dq) {
    Weights weights, ds;
    rest.rows[step % 2].wait_full(step / 2 % 2);
    weigh(s);
    // So late because the fence in it waits for what was written.
    if (!kFirst && step > 1) tell(rest.dq[id].full);
    if constexpr (Config::kTile.early_dv) round(s, weights);
    wgmma_wait<0>();
    arrived(dk), arrived(dp);
    if constexpr (!kFirst) rest.q[last_q].release();  // dk's product was the last to read it
    if constexpr (Config::kTile.early_dv) start_dv(dv, weights);
    rest.ds[step % 2].wait_empty(step / 2 % 2);  // nobody reads the last but one any more
    differentiate(dp, s, ds);
    if constexpr (!Config::kWarpTells) rest.rows[step % 2].empty.arrive();
    if constexpr (!Config::kTile.early_dv) round(s, weights), start_dv(dv, weights);
    if constexpr (!kFirst) {
      rest.ds[(step - 1) % 2].wait_full((step - 1) / 2 % 2);  // the gradients of both
      start_dq(dq, step - 1);
    }
    const bool last_of_heads = head + 1 == args.heads_of_group;
    const int next = block - last_of_heads;
    if constexpr (kMore) start_scores(s, next);
    if constexpr (Config::kTile.ds_in_registers) start_dk(dk, ds);
    tell(rest.ds[step % 2].full);  // its fence waits while products run
    if constexpr (!Config::kTile.ds_in_registers) {
      wait_for_warpgroup();  // the gradients of its own keys are there, and all lanes have read rows
      rest.rows[step % 2].release();
      start_dk(dk, ds);
    }
    wgmma_wait<1 + kMore>();
    arrived(dv);
    rest.grad_o[grad_at.stage].release();
    if constexpr (!kFirst) {
      arrived(dq);
      rest.ds[(step - 1) % 2].release();
      hand_over(dq, step - 1);
    }
    last_head = head;
    if constexpr (kMore) {
      grad_at.advance();
      block = next, head = last_of_heads ? 0 : head + 1;
      start_gradients(dp);
      wgmma_wait<2>();
      arrived(s);
      last_q = q_at.stage, q_at = next_q, next_q.advance(), ++step;
    }
  }

  FX_DEVICE void all_blocks(KvGrad& dk, KvGrad& dv, int steps) {
    Scores s, dp;
    DqPart dq;
    start_scores(s, block);
    next_q.advance();
    rest.v.wait(0);
    start_gradients(dp);
    wgmma_wait<
        0>();  // else the compiler puts dk's zeros between products and serialises all of them
    arrived(s), arrived(dp);
    if (steps == 1) {
      one_block<true, false>(dk, dv, s, dp, dq);
    } else {
      one_block<true, true>(dk, dv, s, dp, dq);
#pragma unroll 1
      while (step + 1 < steps) one_block<false, true>(dk, dv, s, dp, dq);
      one_block<false, false>(dk, dv, s, dp, dq);
      tell(rest.dq[id].full);
    }
    rest.ds[step % 2].wait_full(step / 2 % 2);
    start_dq(dq, step);
    wgmma_wait<0>();
    arrived(dk), arrived(dq);
    hand_over(dq, step);
    tell(rest.dq[id].full);
  }

  // The same with options, which leave registers for the products of one block only.
  FX_DEVICE void blocks_with_options(KvGrad& dk, KvGrad& dv, int steps) {
    Scores s, dp;
    Weights weights, ds;
    DqPart dq;
    scores.look_ahead(head, block);
    rest.v.wait(0);
#pragma unroll 1
    for (; step < steps; ++step) {
      const int i = step % 2;
      const unsigned parity = step / 2 % 2;
      start_scores(s, block);
      start_gradients(dp);
      scores.prepare(head, block);
      rest.rows[i].wait_full(parity);
      wgmma_wait<1>();
      arrived(s);
      scores.weigh(s, rest.stats[i]);
      wgmma_wait<0>();
      arrived(dp);
      scores.differentiate(s, dp, weights, ds, rest.stats[i]);
      start_dv(dv, weights);
      rest.rows[i].empty.arrive();
      rest.ds[i].wait_empty(parity);  // nobody reads the last but one any more
      store_operand(ds, shared.ds(i), 64 * id + warp_row);
      tell(rest.ds[i].full);
      rest.ds[i].wait_full(parity);  // the gradients of both
      start_dq(dq, step);
      start_dk(dk, ds);
      last_head = head;
      const bool last_of_heads = head + 1 == args.heads_of_group;
      head = last_of_heads ? 0 : head + 1, block -= last_of_heads;
      if (step + 1 < steps) scores.look_ahead(head, block);
      wgmma_wait<1>();
      arrived(dv), arrived(dq);
      rest.grad_o[grad_at.stage].release();
      rest.ds[i].release();
      hand_over(dq, step);
      tell(rest.dq[id].full);
      wgmma_wait<0>();
      arrived(dk);
      rest.q[q_at.stage].release();
      q_at.advance(), next_q = q_at, grad_at.advance();
    }
  }

  // Rounds a warp's 16 rows, and writes them through shared memory.
  FX_DEVICE void write(const KvGrad& x, typename Config::KvTile smem, const TensorView& dst,
                       int cols) {
    constexpr int kChunks = kHeadDim / 8;
    const int first = 64 * id + warp_row;
    x.store(smem, first);
    __syncwarp();  // the 16 rows are there
    T* out = static_cast<T*>(dst.data) + task.kv_offset(dst) +
             (int64_t{task.key0} + first) * dst.seq_stride;
#pragma unroll 4
    for (int i = lane_id(); i < 16 * kChunks; i += kWarpSize) {
      const int row = i / kChunks, col = i % kChunks * 8;
      if (task.key0 + first + row < task.seq_kv && col < cols)
        *reinterpret_cast<uint4*>(out + row * dst.seq_stride + col) =
            *reinterpret_cast<const uint4*>(smem.at(first + row, col));
    }
  }
};

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    bwd_kernel(const __grid_constant__ BwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const BwdShared<Config> shared{smem};
  BwdTask& task = shared.rest().task;
  if (threadIdx.x == 0) {
    const auto [key_block, group] =
        block_of_group(blockIdx.x, args.blocks_kv, args.groups, args.groups_at_once);
    task =
        bwd_task<Config::kBlockKV, Config::kBlockQ>(args, group * args.heads_of_group, key_block);
  }
  if (threadIdx.x == kWarpSize) shared.init();
  if (threadIdx.x == 2 * kWarpSize)
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map), prefetch(args.grad_o_map);
  if constexpr (Config::kGeneral)
    if (args.seen.ranges && threadIdx.x < kWarpSize) {
      __syncwarp();  // the task is there
      leave_out_unseen<Config>(args, task);
    }
  __syncthreads();                       // the task is there, and the barriers are set up
  if (task.key0 >= task.seq_kv) return;  // this sequence is shorter than the longest
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<Config::kTile.loader_registers>();
    const int warp = uniform(static_cast<int>(warp_id()));
    if (warp == 0 && lane_id() == 0) load<Config>(args, task, shared);
    if (warp == 1) load_stats<Config>(args, task, shared);
    if (warp == 2 && lane_id() == 0) add_dq<0>(args, task, shared);
    if (warp == 3 && lane_id() == 0) add_dq<1>(args, task, shared);
  } else {
    take_registers<Config::kTile.registers>();
    BwdCompute<Config>(args, task, shared, warpgroup - 1).run();
  }
#endif
}

}  // namespace flash_ext::sm90
