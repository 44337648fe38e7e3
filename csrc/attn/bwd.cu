#include "../vendor.h"

#include <algorithm>

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "bwd.h"
#include "plan.h"

namespace flash_ext {
namespace {

// Whether several products add to one element of dmask.
bool dmask_is_shared(const AttnBwdParams& p) {
  return p.dmask &&
         ((p.dmask_batch_stride == 0 && p.batch > 1) ||
          (p.dmask_head_stride == 0 && p.heads_q > 1) || (p.dmask_q_stride == 0 && p.seq_q > 1) ||
          (p.dmask_kv_stride == 0 && p.seq_kv > 1));
}

}  // namespace

BwdPlan plan_bwd(const AttnBwdParams& p, const GpuFacts& gpu, bool deterministic) {
  const int head_dim = head_dim_of_kernel(p);
  FX_CHECK(!deterministic || !dmask_is_shared(p),
           "deterministic: the gradient of a broadcast attn_mask is not, on a GPU");
  const int64_t pack = p.heads_q / std::max<int64_t>(p.heads_kv, 1);

  BwdPlan plan{{p.dtype, head_dim, needs_general(p, {p.q, p.k, p.v, p.grad_o, p.dk, p.dv})}, {p}};
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

  // As many groups as fit half of the L2 cache with q, grad_o and dq, and as many as fill the device:
  // one after the other, the last would leave a part of it idle.
  const int64_t group_bytes =
      p.seq_q * pack * ((p.head_dim + p.head_dim_v) * element_bytes(p.dtype) + args.dq_cols * 4);
  const int64_t fit = gpu.l2_bytes / 2 / std::max<int64_t>(group_bytes, 1);
  const int64_t slots = int64_t{gpu.multiprocessors} * tile.blocks_per_sm;
  const int64_t fill = slots / std::max<int64_t>(args.blocks_kv, 1);
  args.groups_at_once = static_cast<int>(
      std::clamp<int64_t>(std::max<int64_t>(fit, fill), 1, std::max<int64_t>(args.groups, 1)));
  return plan;
}

int64_t BwdPlan::dq_floats() const { return args.rows * args.dq_cols; }

int64_t BwdPlan::turns() const {
  return takes_turns ? ceil_div(args.groups * args.blocks_q, 2) * 2 : 0;
}

int64_t BwdPlan::scratch_floats() const { return dq_floats() + turns() + 2 * args.rows; }

void BwdPlan::use_scratch(float* scratch) {
  args.dq = scratch;
  if (takes_turns) args.turns = reinterpret_cast<int*>(scratch + dq_floats());
  args.stats = reinterpret_cast<RowStats*>(scratch + dq_floats() + turns());
}

void launch_bwd(const BwdPlan& plan, const GpuFacts& gpu, void* stream) {
  const BwdArgs& args = plan.args;
  if (args.rows > 0) {
    if (args.turns)
      FX_CUDA_CHECK(cudaMemsetAsync(args.turns, 0, plan.turns() * sizeof(int),
                                    static_cast<stream_t>(stream)));
    launch_bwd_start(plan, stream);
  }
  if (args.params.dsinks) launch_bwd_dsinks(plan, stream);
  if (args.groups * args.blocks_kv > 0) {
    const auto launch = with_constants(
        plan.variant.dtype, plan.variant.head_dim,
        [&](auto dtype, auto head_dim) { return find_bwd<dtype(), head_dim()>(plan.variant); });
    launch(args, gpu, stream);
  }
  if (args.rows > 0) launch_bwd_finish(plan, stream);
}

}  // namespace flash_ext
