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
    case 32: return launch<kDType, 32>;
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

// The portable kernels share one tile among heads where there are few queries, and divide the keys where
// there are few tiles.
bool worthwhile(const AttnParams& p) {
  return p.seq_q > 64 && (p.batch * p.heads_q * ceil_div(p.seq_q, 128) >= 64 || p.seq_kv <= 1024);
}

namespace {

// How many rows some thread block computes, if all tiles are the same.
double rows_of_a_block(const AttnParams& p, const GpuFacts& gpu, FwdTile tile) {
  const int64_t tiles = p.batch * p.heads_q * ceil_div(p.seq_q, tile.block_q());
  return static_cast<double>(ceil_div(tiles, gpu.multiprocessors) * tile.block_q());
}

bool even_is_faster(const AttnParams& p, const GpuFacts& gpu, int head_dim, Options options) {
  const FwdTile tile = fwd_tile(head_dim, options, false), even = fwd_tile(head_dim, options, true);
  if (tile == even) return false;
  if (head_dim == 64 && (p.window_left >= 0 || p.window_right >= 0)) return true;
  const double slower = head_dim == 64 ? 1.06 : 1.13;  // a row of the even tile (performance log)
  return rows_of_a_block(p, gpu, tile) > slower * rows_of_a_block(p, gpu, even);
}

// Whether warpgroups take turns at products. Where those are short, as are the rows, it is better to start
// them at once (performance log).
bool take_turns(const AttnParams& p, int head_dim, Options options) {
  if (head_dim > 64 || options != Options::none) return true;
  return head_dim == 64 && p.seq_kv > 2048;
}

// Heads whose tiles are started together. Under a causal mask tiles come with the longest first; where
// each thread block gets two, a long one and a short one, their shares are equal.
int heads_together(const AttnParams& p, const GpuFacts& gpu, int64_t heads, int blocks_q) {
  const int64_t sharing = p.heads_q / std::max<int64_t>(p.heads_kv, 1);
  const int in_cache = heads_in_cache(p, gpu, heads, sharing);
  if (p.window_right < 0 || blocks_q == 0) return in_cache;
  const int64_t pairs =
      ceil_div(std::max(2 * gpu.multiprocessors / blocks_q, 1), sharing) * sharing;
  return static_cast<int>(std::min<int64_t>(in_cache, pairs));
}

}  // namespace

FwdPlan plan_fwd(const AttnParams& p, const GpuFacts& gpu) {
  const int head_dim = compiled_head_dim(p, kFwdHeadDims);
  const Options options = needed_options(p);
  const bool even = even_is_faster(p, gpu, head_dim, options);
  FwdPlan plan{head_dim, options, even, {p}};
  plan.turns = take_turns(p, head_dim, options);
  flash_ext::FwdArgs& args = plan.args;
  args.blocks_q = static_cast<int>(ceil_div(p.seq_q, fwd_tile(head_dim, options, even).block_q()));
  args.heads = p.batch * p.heads_q;
  args.heads_at_once = heads_together(p, gpu, args.heads, args.blocks_q);
  args.seen = plan_seen_keys(p);

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
  if (plan.args.seen.ranges) launch_seen_keys(plan.args.params, plan.args.seen, stream);
  launcher(plan, stream);
}

}  // namespace flash_ext::sm90
