// Merges what several thread blocks have found for the same rows from different keys.
#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "fwd.h"
#include "online_softmax.h"

namespace flash_ext {
namespace {

constexpr int kWarps = 4, kMostCols = 256;

template <typename Op>
FX_DEVICE float warp_reduce(float x, Op op) {
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) x = op(x, shuffle_xor(x, mask));
  return x;
}

// One thread block a row, the rows in the order of lse. Each warp sums some of the splits.
template <typename T>
__global__ void __launch_bounds__(kWarps* kWarpSize) combine_kernel(const FwdArgs args) {
  constexpr int kCols = kMostCols / kWarpSize;  // that a lane sums
  __shared__ float weight[kMostSplits], partial[kWarps][kMostCols];
  const AttnParams& p = args.params;
  const int64_t row = blockIdx.x;
  const int lane = lane_id(), warp = warp_id();
  const int cols = static_cast<int>(p.head_dim_v);

  const int64_t seq_q = p.cu_seqlens_q ? p.lse_head_stride : p.seq_q;
  const int64_t i = row % seq_q, head = row / seq_q % p.heads_q, batch = row / seq_q / p.heads_q;
  const float sink = p.sinks ? static_cast<const float*>(p.sinks)[head] * kLog2e : -INFINITY;
  const auto lse_of = [&](int split) { return args.lse_partial[split * args.partial_rows + row]; };
  float top = -INFINITY, sum = 0.f;
  for (int split = lane; split < args.splits; split += kWarpSize) top = fmaxf(top, lse_of(split));
  top = fmaxf(warp_reduce(top, [](float a, float b) { return fmaxf(a, b); }), sink);
  const float shift = top == -INFINITY ? 0.f : top;
  for (int split = lane; split < args.splits; split += kWarpSize) {
    const float x = fast_exp2(lse_of(split) - shift);
    weight[split] = x;  // all warps write the same
    sum += x;
  }
  sum = warp_reduce(sum, [](float a, float b) { return a + b; }) + fast_exp2(sink - shift);
  if (threadIdx.x == 0)
    static_cast<float*>(p.lse)[row] = sum == 0.f ? -INFINITY : (shift + log2f(sum)) * kLn2;
  __syncthreads();  // the weights are there

  float total[kCols] = {};
#pragma unroll 4
  for (int split = warp; split < args.splits; split += kWarps) {
    const float* o = args.o_partial + (split * args.partial_rows + row) * cols;
    const float w = weight[split];
#pragma unroll
    for (int c = 0; c < kCols; ++c) {
      const int col = lane + c * kWarpSize;
      if (col < cols && w != 0.f) total[c] += w * o[col];
    }
  }
#pragma unroll
  for (int c = 0; c < kCols; ++c) partial[warp][lane + c * kWarpSize] = total[c];
  __syncthreads();  // all warps' sums are there

  T* o = static_cast<T*>(p.o.data) + batch * p.o.batch_stride + head * p.o.head_stride +
         i * p.o.seq_stride;
  for (int col = threadIdx.x; col < cols; col += kWarps * kWarpSize) {
    float x = 0.f;
    for (int w = 0; w < kWarps; ++w) x += partial[w][col];
    o[col] = from_float<T>(sum == 0.f ? 0.f : x / sum);
  }
}

}  // namespace

void launch_combine(const FwdPlan& plan, const GpuFacts& gpu, void* stream) {
  const auto kernel = plan.variant.dtype == DType::f16    ? combine_kernel<half_t>
                      : plan.variant.dtype == DType::bf16 ? combine_kernel<bf16_t>
                                                          : combine_kernel<float>;
  FX_CHECK(plan.args.partial_rows < int64_t{1} << 31, "q: too many rows for one call");
  kernel<<<static_cast<unsigned>(plan.args.partial_rows), kWarps * gpu.warp_size, 0,
           static_cast<stream_t>(stream)>>>(plan.args);
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
