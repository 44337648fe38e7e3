#include "../vendor.h"

#include <algorithm>
#include <cmath>

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "fwd.h"
#include "plan.h"

namespace flash_ext {
namespace {

// Dividing the keys fills the device, but the parts must be merged. Which number is best is
// estimated in microseconds; the constants are an H200's.
int choose_splits(const FwdVariant& v, const FwdTile& tile, int64_t tiles, int64_t slots,
                  int64_t blocks_kv, int64_t output_values) {
  constexpr double kFlopsOfSlot = 1.2e6, kBytes = 4e6;  // a microsecond
  constexpr double kStart = 2.0, kMerge = 4.0, kFewRowsBlock = 1.5;
  if (tiles >= 2 * slots) return 1;
  const double products = v.dtype == DType::f32 ? 5.0 : 1.0;  // six for one, better hidden
  const double flops = 4.0 * tile.block_q * tile.block_kv * v.head_dim * products;
  const double bytes = 2.0 * element_bytes(v.dtype) * tile.block_kv * v.head_dim;
  const double compute = v.rows == FwdRows::few ? kFewRowsBlock : flops / kFlopsOfSlot;
  int best = 1;
  double best_time = 0;
  for (int splits = 1; splits <= std::min<int64_t>(kMostSplits, blocks_kv); ++splits) {
    const double rounds = ceil_div(tiles * splits, slots);
    const double memory = bytes * std::min<int64_t>(tiles * splits, slots) / kBytes;
    const double block = std::sqrt(compute * compute + memory * memory);
    const double merge = splits > 1 ? kMerge + 8.0 * output_values * splits / kBytes : 0;
    const double time = rounds * (ceil_div(blocks_kv, splits) * block + kStart) + merge;
    if (splits == 1 || time < best_time) best = splits, best_time = time;
  }
  return best;
}

}  // namespace

FwdPlan plan_fwd(const AttnParams& p, const GpuFacts& gpu) {
  const int64_t group = p.heads_q / std::max<int64_t>(p.heads_kv, 1);
  const int head_dim = head_dim_of_kernel(p);
  FwdPlan plan{{p.dtype, head_dim, FwdRows::many, needs_general(p, {p.q, p.k, p.v, p.o})}, {p}};
  FwdArgs& args = plan.args;
  const bool shares_kv = group > 1;
  for (const FwdRows rows : {FwdRows::some, FwdRows::few}) {
    const FwdVariant v{p.dtype, head_dim, rows, plan.variant.general};
    if (v.compiled() && p.seq_q * group <= fwd_tile(v, kAmd).block_q) plan.variant = v;
  }
  FwdTile tile = fwd_tile(plan.variant, kAmd);
  const FwdVariant general{p.dtype, head_dim, FwdRows::many, true};
  const int general_rows = fwd_tile(general, kAmd).block_q;
  const bool smaller_holds_all = plan.variant.rows == FwdRows::many &&
                                 general_rows < tile.block_q && p.seq_q * group <= general_rows;
  if (smaller_holds_all || tile.smem_bytes(plan.variant) > gpu.smem_per_block) {
    plan.variant = general;
    tile = fwd_tile(plan.variant, kAmd);
  }
  FX_CHECK(tile.smem_bytes(plan.variant) <= gpu.smem_per_block, "q: head_dim ", head_dim,
           " of this dtype needs ", tile.smem_bytes(plan.variant),
           " bytes of shared memory, this GPU has ", gpu.smem_per_block);
  const int64_t packed = ceil_div(p.seq_q * group, tile.block_q);
  const int64_t apart = ceil_div(p.seq_q, tile.block_q);
  const int pack = shares_kv && packed < apart * group ? static_cast<int>(group) : 1;
  args.pack = Divisor(pack);
  args.blocks_q = static_cast<int>(pack > 1 ? packed : apart);
  args.heads = p.batch * p.heads_q / pack;
  args.longest_last = p.window_right >= 0;
  args.heads_at_once = heads_in_cache(p, gpu, args.heads, group / pack);

  if (pack == 1) args.seen = plan_seen_keys(p);

  // A window leaves fewer keys to divide.
  int64_t seen = p.seq_kv;
  if (p.window_left >= 0 && p.window_right >= 0)
    seen = std::min<int64_t>(seen, p.window_left + p.window_right + ceil_div(tile.block_q, pack));
  const int64_t slots = int64_t{gpu.multiprocessors} * tile.blocks_per_sm;
  args.partial_rows =
      p.cu_seqlens_q ? p.lse_head_stride * p.heads_q : p.batch * p.heads_q * p.seq_q;
  args.partial_cols = static_cast<int>(ceil_div(p.head_dim_v, 4) * 4);
  args.splits = choose_splits(plan.variant, tile, args.heads * args.blocks_q, slots,
                              ceil_div(seen, tile.block_kv), args.partial_rows * p.head_dim_v);
  return plan;
}

int64_t FwdPlan::scratch_floats() const {
  const int64_t partial = args.splits * args.partial_rows * (args.partial_cols + 1);
  return 2 * args.seen.count() + (args.splits == 1 ? 0 : partial);
}

void FwdPlan::use_scratch(float* scratch) {
  if (args.seen.count()) args.seen.ranges = reinterpret_cast<const SeenRange*>(scratch);
  args.o_partial = scratch + 2 * args.seen.count();
  args.lse_partial = args.o_partial + args.splits * args.partial_rows * args.partial_cols;
}

void launch_fwd(const FwdPlan& plan, const GpuFacts& gpu, void* stream) {
  if (plan.args.heads * plan.args.blocks_q == 0) return;
  const auto launch = with_constants(
      plan.variant.dtype, plan.variant.head_dim,
      [&](auto dtype, auto head_dim) { return find_fwd<dtype(), head_dim()>(plan.variant); });
  if (plan.args.seen.ranges) launch_seen_keys(plan.args.params, plan.args.seen, stream);
  launch(plan.args, gpu, stream);
  if (plan.args.splits > 1) launch_combine(plan, gpu, stream);
}

}  // namespace flash_ext
