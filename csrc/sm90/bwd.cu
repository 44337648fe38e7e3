#include "../vendor.h"

#include <algorithm>

#include "../attn/plan.h"
#include "../gpu_check.h"
#include "bwd.h"
#include "bwd_wide_variants.h"
#include "fwd.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {
namespace {

template <DType kDType>
BwdLauncher launcher_of_dtype(int head_dim) {
  switch (head_dim) {
    case 64: return launch_main<kDType, 64>;
    case 80: return launch_main<kDType, 80>;
    case 96: return launch_main<kDType, 96>;
    case 128: return launch_main<kDType, 128>;
    case 192: return launch_wide<kDType, 192>;
    default: return launch_wide<kDType, 256>;
  }
}

// How many groups run together. Blocks of keys of one group read the same rows, and where no kernel adds
// to sums of dq, groups best follow each other. Else, and where a mask makes some blocks longer than
// others, those of two rounds of the device run together, the longest blocks first, so that it is busy to
// the end. The last groups should be about as many as the others, or they would end with long blocks.
int groups_at_once(const flash_ext::BwdArgs& args, const GpuFacts& gpu, bool wide) {
  const AttnParams& p = args.params;
  const bool is_banded = (p.window_left < 0) != (p.window_right < 0);
  if (args.groups == 0 || (wide && !is_banded)) return 1;
  const int64_t two_rounds =
      ceil_div(2 * gpu.multiprocessors, std::max<int64_t>(args.blocks_kv, 1));
  const int64_t most = std::clamp<int64_t>(two_rounds, 1, args.groups);
  const auto last = [&](int64_t together) { return (args.groups - 1) % together + 1; };
  int64_t best = most;
  for (int64_t less = most - 1; less >= ceil_div(most, 2); --less)
    if (last(less) * best > last(best) * less) best = less;
  return static_cast<int>(best);
}

}  // namespace

std::optional<std::string> obstacle(const AttnBwdParams& p, const GpuFacts& gpu) {
  if (auto why = obstacle(static_cast<const AttnParams&>(p), gpu)) return why;
  if (p.mask.data && p.mask.dtype != DType::b8 && p.mask.dtype != DType::f32 &&
      p.mask.dtype != p.dtype)
    return "it has gradients with an attn_mask of bool, float32 or the dtype of q";
  if (std::max(p.mask.q_stride, p.mask.kv_stride) >= int64_t{1} << 23)
    return "attn_mask: its rows are too far from each other";
  if (p.rows_q == 0) return "there is no query";
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  if (!can_be_copied(p.grad_o, {batch, p.heads_q, p.rows_q, p.head_dim_v}))
    return "grad_out: it needs rows aligned to 16 bytes, and none that stand for several";
  if (!in_chunks(p.dq, 2) || !in_chunks(p.dk, 2) || !in_chunks(p.dv, 2))
    return "it needs gradients aligned to 16 bytes";
  if (p.batch * p.heads_kv * ceil_div(p.seq_kv, DkvTile::block_kv) >= int64_t{1} << 30)
    return "there are too many keys";
  return std::nullopt;
}

// The portable kernels pack heads that share keys into one block of rows, and have tiles of head_dim
// 32.
bool worthwhile(const AttnBwdParams& p) {
  return p.seq_q > 64 && std::max(p.head_dim, p.head_dim_v) > 32;
}

int64_t BwdPlan::scratch_floats() const { return BwdSums::scratch_floats() + 2 * seen.count(); }

void BwdPlan::use_scratch(float* scratch) {
  BwdSums::use_scratch(scratch);
  if (seen.count())
    seen.ranges = reinterpret_cast<const SeenRange*>(scratch + BwdSums::scratch_floats());
}

BwdPlan plan_bwd(const AttnBwdParams& p, const GpuFacts& gpu, bool deterministic) {
  check_deterministic(p, deterministic);
  const int head_dim = compiled_head_dim(p, kBwdHeadDims);
  const bool wide = is_wide(head_dim);
  // wide: no sum is shared
  BwdPlan plan{{{p}, deterministic && !wide}, head_dim, needed_options(p)};
  flash_ext::BwdArgs& args = plan.args;
  args.pack = Divisor(1);
  const int block_kv = wide ? DkvTile::block_kv : BwdTile::block_kv;
  const int block_q = wide ? DqTile::block_q : bwd_tile(head_dim, plan.options).block_q;
  args.blocks_kv = static_cast<int>(ceil_div(p.seq_kv, block_kv));
  args.groups = p.batch * p.heads_kv;
  args.rows = p.cu_seqlens_q ? p.lse_head_stride * p.heads_q : p.batch * p.heads_q * p.seq_q;
  args.dq_cols = wide ? 0 : head_dim;
  args.dq_paired = true;
  args.turn_parts = BwdTile::warpgroups;
  args.blocks_q = static_cast<int>(ceil_div(p.seq_q, block_q));
  args.groups_at_once = groups_at_once(args, gpu, wide);
  if (!deterministic || wide)  // turns count every block that a band mask leaves
    plan.seen = plan_seen_keys(p);
  return plan;
}

void launch_bwd(const BwdPlan& plan, void* stream) {
  const flash_ext::BwdArgs& args = plan.args;
  launch_bwd_start(plan, stream);
  launch_bwd_dsinks(args, stream);
  if (plan.seen.ranges) launch_seen_keys(args.params, plan.seen, stream);
  if (args.groups * args.blocks_kv > 0) {
    const auto launch = args.params.dtype == DType::f16
                            ? launcher_of_dtype<DType::f16>(plan.head_dim)
                            : launcher_of_dtype<DType::bf16>(plan.head_dim);
    launch(plan, stream);
  }
  if (!is_wide(plan.head_dim)) launch_bwd_finish(args, stream);
}

}  // namespace flash_ext::sm90
