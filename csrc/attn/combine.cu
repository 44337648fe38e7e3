// Merges what several thread blocks have found for the same rows from different keys.
#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "fwd.h"
#include "online_softmax.h"

namespace flash_ext {
namespace {

// A warp sums so many splits at most, all of which it loads before it waits for one.
constexpr int kSplitsOfWarp = 8, kMostWarps = kMostSplits / kSplitsOfWarp, kMostCols = 256;

template <typename Op>
FX_DEVICE float warp_reduce(float x, Op op) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) x = op(x, shuffle_xor(x, mask));
  return x;
}

// One thread block a row, the rows in the order of lse; each warp sums some of the splits.
template <typename T>
__global__ void __launch_bounds__(kMostWarps* kWarpSize) combine_kernel(const FwdArgs args) {
  constexpr int kLaneSplits = kMostSplits / kWarpSize;  // whose lse a lane reads
  constexpr int kPasses = kMostCols / (4 * kWarpSize);  // columns are read four at a time
  __shared__ float weight[kMostSplits];
  __shared__ __align__(16) float partial[kMostWarps][kMostCols];
  const AttnParams& p = args.params;
  const unsigned row = blockIdx.x;
  const int lane = lane_id(), warp = warp_id(), warps = blockDim.x / kWarpSize;
  const int cols = static_cast<int>(p.head_dim_v);

  float lse[kLaneSplits];
#pragma unroll
  for (int i = 0; i < kLaneSplits; ++i) {
    const int split = lane + i * kWarpSize;
    lse[i] = split < args.splits ? args.lse_partial[split * args.partial_rows + row] : -INFINITY;
  }
  float4 o_part[kSplitsOfWarp][kPasses];
#pragma unroll
  for (int i = 0; i < kSplitsOfWarp; ++i)
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int split = warp + i * warps, col = (lane + pass * kWarpSize) * 4;
      if (split < args.splits && col < cols)
        o_part[i][pass] = *reinterpret_cast<const float4*>(
            args.o_partial + (split * args.partial_rows + row) * args.partial_cols + col);
    }

  const unsigned seq_q = static_cast<unsigned>(p.cu_seqlens_q ? p.lse_head_stride : p.seq_q);
  const unsigned heads_q = static_cast<unsigned>(p.heads_q), batch_head = row / seq_q;
  const unsigned i_q = row % seq_q, head = batch_head % heads_q, batch = batch_head / heads_q;
  const float sink = p.sinks ? static_cast<const float*>(p.sinks)[head] * kLog2e : -INFINITY;
  float top = -INFINITY, sum = 0.f;
  for (float x : lse) top = fmaxf(top, x);
  top = fmaxf(warp_reduce(top, [](float a, float b) { return fmaxf(a, b); }), sink);
  const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
  for (int i = 0; i < kLaneSplits; ++i) {
    const float x = fast_exp2(lse[i] - shift);
    weight[lane + i * kWarpSize] = x;  // all warps write the same
    sum += x;
  }
  sum = warp_reduce(sum, [](float a, float b) { return a + b; }) + fast_exp2(sink - shift);
  if (threadIdx.x == 0 && p.lse)
    static_cast<float*>(p.lse)[row] = sum == 0.f ? -INFINITY : (shift + log2f(sum)) * kLn2;
  __syncthreads();  // the weights are there

#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float4 total = {};
#pragma unroll
    for (int i = 0; i < kSplitsOfWarp; ++i) {
      const int split = warp + i * warps;
      const float w = split < args.splits ? weight[split] : 0.f;
      if (w == 0.f) continue;  // its values may be anything
      const float4& x = o_part[i][pass];
      total = {total.x + w * x.x, total.y + w * x.y, total.z + w * x.z, total.w + w * x.w};
    }
    *reinterpret_cast<float4*>(&partial[warp][(lane + pass * kWarpSize) * 4]) = total;
  }
  __syncthreads();  // all warps' sums are there

  T* o = static_cast<T*>(p.o.data) + batch * p.o.batch_stride + head * p.o.head_stride +
         i_q * p.o.seq_stride;
  for (int col = threadIdx.x; col < cols; col += blockDim.x) {
    float x = 0.f;
    for (int w = 0; w < warps; ++w) x += partial[w][col];
    o[col] = from_float<T>(sum == 0.f ? 0.f : x / sum);
  }
}

}  // namespace

void launch_combine(const FwdPlan& plan, const GpuFacts& gpu, void* stream) {
  const auto kernel = plan.variant.dtype == DType::f16    ? combine_kernel<half_t>
                      : plan.variant.dtype == DType::bf16 ? combine_kernel<bf16_t>
                                                          : combine_kernel<float>;
  FX_CHECK(plan.args.partial_rows < int64_t{1} << 31, "q: too many rows for one call");
  const int warps = (plan.args.splits + kSplitsOfWarp - 1) / kSplitsOfWarp;
  kernel<<<static_cast<unsigned>(plan.args.partial_rows), warps * gpu.warp_size, 0,
           static_cast<stream_t>(stream)>>>(plan.args);
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
