// Merges what several thread blocks have found for the same rows from different keys.
#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "fwd.h"
#include "online_softmax.h"

namespace flash_ext {
namespace {

constexpr int kWarps = 4;

// One warp a row, the rows in the order of lse.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarpSize) combine_kernel(const FwdArgs args) {
  const AttnParams& p = args.params;
  const int64_t row = int64_t{blockIdx.x} * kWarps + warp_id();
  if (row >= args.partial_rows) return;
  const int64_t seq_q = p.cu_seqlens_q ? p.lse_head_stride : p.seq_q;
  const int64_t i = row % seq_q, head = row / seq_q % p.heads_q, batch = row / seq_q / p.heads_q;

  float top = -INFINITY, sum = 0.f;
  const auto lse_of = [&](int split) { return args.lse_partial[split * args.partial_rows + row]; };
  const auto warp_reduce = [](float x, auto op) {
#pragma unroll
    for (int mask = 1; mask < kWarpSize; mask *= 2) x = op(x, shuffle_xor(x, mask));
    return x;
  };
  for (int split = lane_id(); split < args.splits; split += kWarpSize)
    top = fmaxf(top, lse_of(split));
  top = warp_reduce(top, [](float a, float b) { return fmaxf(a, b); });
  const float sink =
      p.sinks ? static_cast<const float*>(p.sinks)[head] * kLog2e : -INFINITY;
  top = fmaxf(top, sink);
  const float shift = top == -INFINITY ? 0.f : top;
  for (int split = lane_id(); split < args.splits; split += kWarpSize)
    sum += fast_exp2(lse_of(split) - shift);
  sum = warp_reduce(sum, [](float a, float b) { return a + b; }) + fast_exp2(sink - shift);
  const float inverse = sum == 0.f ? 0.f : 1.f / sum;
  if (lane_id() == 0) static_cast<float*>(p.lse)[row] = sum == 0.f ? -INFINITY : (shift + log2f(sum)) * kLn2;

  T* o = static_cast<T*>(p.o.data) + batch * p.o.batch_stride + head * p.o.head_stride +
         i * p.o.seq_stride;
  for (int col = lane_id(); col < p.head_dim_v; col += kWarpSize) {
    float x = 0.f;
    for (int split = 0; split < args.splits; ++split) {
      const float lse = lse_of(split);
      if (lse != -INFINITY)
        x += fast_exp2(lse - shift) * inverse *
             args.o_partial[(split * args.partial_rows + row) * p.head_dim_v + col];
    }
    o[col] = from_float<T>(x);
  }
}

}  // namespace

void launch_combine(const FwdPlan& plan, const GpuFacts& gpu, void* stream) {
  const auto kernel = plan.variant.dtype == DType::f16 ? combine_kernel<half_t> : combine_kernel<bf16_t>;
  const int64_t blocks = (plan.args.partial_rows + kWarps - 1) / kWarps;
  kernel<<<static_cast<unsigned>(blocks), kWarps * gpu.warp_size, 0,
           static_cast<stream_t>(stream)>>>(plan.args);
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
