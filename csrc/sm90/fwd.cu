#include "../vendor.h"

#include <algorithm>

#include "../attn/plan.h"
#include "../gpu_check.h"
#include "fwd.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {
namespace {

constexpr int64_t kMostTiles = int64_t{1} << 30;

// Elsewhere the kernels are compiled as empty ones.
constexpr bool built_for_hopper() {
  for (int arch : {__CUDA_ARCH_LIST__})
    if (arch == 900) return true;
  return false;
}

template <DType kDType>
FwdLauncher launcher_of_dtype(int head_dim) {
  switch (head_dim) {
    case 64: return launch<kDType, 64>;
    case 80: return launch<kDType, 80>;
    case 96: return launch<kDType, 96>;
    case 128: return launch<kDType, 128>;
    case 192: return launch<kDType, 192>;
    default: return launch<kDType, 256>;
  }
}

}  // namespace

std::optional<std::string> obstacle(const AttnParams& p, const GpuFacts& gpu) {
  if (!gpu.hopper) return "it needs a Hopper GPU (sm_90)";
  if (!built_for_hopper()) return "the extension was built without sm_90a";
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "it has float16 and bfloat16";
  if (p.mask.data) return "it has no attn_mask";
  if (p.softcap > 0) return "it has no softcap";
  if (p.alibi_slopes) return "it has no alibi_slopes";
  if (p.dropout_threshold) return "it has no dropout_p";
  if (p.head_dim % 8 || p.head_dim_v % 8) return "it has head_dim in multiples of 8";
  if (p.head_dim == 0 || p.head_dim_v == 0) return "there is no column";
  if (p.rows_kv == 0) return "there is no key";
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  if (!can_be_copied(p.q, {batch, p.heads_q, p.rows_q, p.head_dim}) ||
      !can_be_copied(p.k, {batch, p.heads_kv, p.rows_kv, p.head_dim}) ||
      !can_be_copied(p.v, {batch, p.heads_kv, p.rows_kv, p.head_dim_v}))
    return "q, k, v: it needs rows aligned to 16 bytes, and none that stand for several";
  if (!in_chunks(p.o, 2)) return "it needs an output aligned to 16 bytes";
  constexpr int64_t kMostRows = int64_t{1} << 29;
  if (p.rows_q >= kMostRows || p.rows_kv >= kMostRows) return "it has up to 2^29 rows";
  if (p.batch * p.heads_q * ceil_div(p.seq_q, 128) >= kMostTiles) return "there are too many rows";
  return std::nullopt;
}

// The portable kernels share one tile among heads where there are few queries, divide the keys where
// there are few tiles, and have tiles of head_dim 32.
bool worthwhile(const AttnParams& p) {
  if (std::max(p.head_dim, p.head_dim_v) <= 32 && p.seq_q < 1024) return false;
  return p.seq_q > 64 && (p.batch * p.heads_q * ceil_div(p.seq_q, 128) >= 64 || p.seq_kv <= 1024);
}

FwdPlan plan_fwd(const AttnParams& p, const GpuFacts& gpu) {
  const int head_dim = compiled_head_dim(p, kFwdHeadDims);
  FwdPlan plan{head_dim, {p}};
  flash_ext::FwdArgs& args = plan.args;
  args.blocks_q = static_cast<int>(ceil_div(p.seq_q, fwd_tile(head_dim).block_q()));
  args.heads = p.batch * p.heads_q;
  args.longest_last = p.window_right >= 0;

  args.heads_at_once =
      heads_in_cache(p, gpu, args.heads, p.heads_q / std::max<int64_t>(p.heads_kv, 1));

  // To zero the counter takes as long as some tiles do.
  constexpr double kLongFlops = 3e10;  // 50 microseconds
  const int64_t tiles = args.heads * args.blocks_q;
  plan.thread_blocks = std::min<int64_t>(tiles, gpu.multiprocessors);
  plan.counts = tiles > gpu.multiprocessors &&
                4.0 * args.heads * p.seq_q * p.seq_kv *
                        static_cast<double>(std::max<int64_t>(p.head_dim, p.head_dim_v)) >
                    kLongFlops;
  return plan;
}

void launch_fwd(const FwdPlan& plan, void* stream) {
  if (plan.thread_blocks == 0) return;
  const auto launcher = plan.args.params.dtype == DType::f16
                            ? launcher_of_dtype<DType::f16>(plan.head_dim)
                            : launcher_of_dtype<DType::bf16>(plan.head_dim);
  launcher(plan, stream);
}

}  // namespace flash_ext::sm90
