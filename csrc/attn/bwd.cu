#include "../vendor.h"

#include <algorithm>

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "bwd.h"
#include "plan.h"

namespace flash_ext {

BwdPlan plan_bwd(const AttnBwdParams& p, const GpuFacts& gpu, bool deterministic) {
  const int head_dim = head_dim_of_kernel(p);
  check_deterministic(p, deterministic);
  const int64_t pack = p.heads_q / std::max<int64_t>(p.heads_kv, 1);

  BwdPlan plan{{{p}}, {p.dtype, head_dim, needs_general(p, {p.q, p.k, p.v, p.grad_o, p.dk, p.dv})}};
  BwdArgs& args = plan.args;
  BwdTile tile = bwd_tile(plan.variant, kAmd);
  if (tile.smem_bytes(plan.variant, gpu.adds_async) > gpu.smem_per_block) {
    plan.variant.general = true;
    tile = bwd_tile(plan.variant, kAmd);
  }
  const int smem_bytes = tile.smem_bytes(plan.variant, gpu.adds_async);
  FX_CHECK(smem_bytes <= gpu.smem_per_block, "q: the gradient of head_dim ", head_dim,
           " in this dtype needs ", smem_bytes, " bytes of shared memory, this GPU has ",
           gpu.smem_per_block);
  args.pack = Divisor(static_cast<int>(pack));
  args.blocks_kv = static_cast<int>(ceil_div(p.seq_kv, tile.block_kv));
  args.groups = p.batch * p.heads_kv;
  args.rows = p.cu_seqlens_q ? p.lse_head_stride * p.heads_q : p.batch * p.heads_q * p.seq_q;
  args.dq_cols = head_dim;
  args.dq_flip = tile.async_dq && gpu.adds_async ? 8 : 0;
  args.blocks_q = static_cast<int>(ceil_div(p.seq_q * pack, tile.block_q));
  plan.takes_turns = deterministic;

  args.groups_at_once =
      groups_at_once(args, gpu, int64_t{gpu.multiprocessors} * tile.blocks_per_sm);
  return plan;
}

void launch_bwd(const BwdPlan& plan, const GpuFacts& gpu, void* stream) {
  const BwdArgs& args = plan.args;
  launch_bwd_start(plan, stream);
  launch_bwd_dsinks(args, stream);
  if (args.groups * args.blocks_kv > 0) {
    const auto launch = with_constants(
        plan.variant.dtype, plan.variant.head_dim,
        [&](auto dtype, auto head_dim) { return find_bwd<dtype(), head_dim()>(plan.variant); });
    launch(args, gpu, stream);
  }
  launch_bwd_finish(args, stream);
}

}  // namespace flash_ext
