#include "../vendor.h"

#include <algorithm>

#include "../checks.h"
#include "bwd_sums.h"
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

void check_deterministic(const AttnBwdParams& p, bool deterministic) {
  FX_CHECK(!deterministic || !dmask_is_shared(p),
           "deterministic: the gradient of a broadcast attn_mask is not, on a GPU");
}

int groups_at_once(const BwdArgs& args, const GpuFacts& gpu, int64_t slots) {
  const AttnBwdParams& p = args.params;
  const int64_t rows = p.seq_q * (p.heads_q / std::max<int64_t>(p.heads_kv, 1));
  const int64_t group_bytes =
      rows * ((p.head_dim + p.head_dim_v) * element_bytes(p.dtype) + args.dq_cols * 4);
  const int64_t fit = gpu.l2_bytes / 2 / std::max<int64_t>(group_bytes, 1);
  const int64_t fill = slots / std::max<int64_t>(args.blocks_kv, 1);
  return static_cast<int>(
      std::clamp<int64_t>(std::max<int64_t>(fit, fill), 1, std::max<int64_t>(args.groups, 1)));
}

int64_t BwdSums::dq_floats() const { return args.rows * args.dq_cols; }

int64_t BwdSums::turns() const {
  if (!takes_turns) return 0;
  const int64_t groups =
      args.params.batch * args.params.heads_q / std::max<int64_t>(args.pack.by, 1);
  return ceil_div(groups * args.blocks_q * args.turn_parts, 2) * 2;
}

int64_t BwdSums::scratch_floats() const { return dq_floats() + turns() + 2 * args.rows; }

void BwdSums::use_scratch(float* scratch) {
  args.dq = scratch;
  if (takes_turns) args.turns = reinterpret_cast<int*>(scratch + dq_floats());
  args.stats = reinterpret_cast<RowStats*>(scratch + dq_floats() + turns());
}

}  // namespace flash_ext
