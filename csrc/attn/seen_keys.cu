#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "plan.h"

namespace flash_ext {
namespace {

constexpr int kThreads = 256;

struct alignas(16) Chunk {
  uint32_t word[4];
};

// The keys of a chunk of 16, or of a single one, that a bit is set for.
FX_DEVICE SeenRange range_of(const Chunk& seen, int key) {
  SeenRange range{INT32_MAX, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (!seen.word[i]) continue;
    range.begin = std::min<int>(range.begin, key + 4 * i + (__ffs(seen.word[i]) - 1) / 8);
    range.end = key + 4 * i + 4 - __clz(seen.word[i]) / 8;
  }
  return range;
}
FX_DEVICE SeenRange range_of(uint8_t seen, int key) {
  return seen ? SeenRange{key, key + 1} : SeenRange{INT32_MAX, 0};
}

FX_DEVICE void add(Chunk& all, const Chunk& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) all.word[i] |= x.word[i];
}
FX_DEVICE void add(uint8_t& all, uint8_t x) { all |= x; }

// One thread block for each range; each thread has some columns of the mask. Elements are read as
// C's, which are kWide keys each.
template <typename C>
__global__ void __launch_bounds__(kThreads)
    seen_keys_kernel(const MaskView mask, SeenRange* ranges, int queries, int keys) {
  constexpr int kWide = sizeof(C);
  __shared__ int begin, end;
  if (threadIdx.x == 0) begin = INT32_MAX, end = 0;
  __syncthreads();  // both are set up
  const int first = blockIdx.x * kSeenQueries, last = std::min<int>(first + kSeenQueries, queries);
  const uint8_t* rows = static_cast<const uint8_t*>(mask.data) + blockIdx.z * mask.batch_stride +
                        blockIdx.y * mask.head_stride;
  SeenRange mine{INT32_MAX, 0};
  for (int key = threadIdx.x * kWide; key < keys; key += kThreads * kWide) {
    C seen{};
#pragma unroll 8
    for (int query = first; query < last; ++query)
      add(seen, *reinterpret_cast<const C*>(rows + query * mask.q_stride + key));
    const SeenRange here = range_of(seen, key);
    mine = {std::min<int>(mine.begin, here.begin), std::max<int>(mine.end, here.end)};
  }
  if (mine.end) atomicMin(&begin, mine.begin), atomicMax(&end, mine.end);
  __syncthreads();  // all threads' keys are in it
  if (threadIdx.x == 0)
    ranges[(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = {begin, end};
}

}  // namespace

SeenKeys plan_seen_keys(const AttnParams& p) {
  // To read the mask once more takes as long as some tiles do.
  constexpr double kLongFlops = 3e10;
  const MaskView& mask = p.mask;
  const double flops = 4.0 * p.batch * p.heads_q * p.seq_q * p.seq_kv *
                       static_cast<double>(std::max<int64_t>(p.head_dim, p.head_dim_v));
  constexpr int64_t kMostBlocks = 65535;
  if (!mask.data || mask.dtype != DType::b8 || mask.kv_stride != 1 || flops < kLongFlops ||
      p.batch > kMostBlocks || p.heads_q > kMostBlocks)
    return {};
  SeenKeys seen;
  seen.batches = mask.batch_stride ? static_cast<int>(p.batch) : 1;
  seen.heads = mask.head_stride ? static_cast<int>(p.heads_q) : 1;
  seen.blocks = mask.q_stride ? static_cast<int>(ceil_div(p.seq_q, kSeenQueries)) : 1;
  seen.head_stride = mask.head_stride ? seen.blocks : 0;
  seen.batch_stride = mask.batch_stride ? int64_t{seen.heads} * seen.blocks : 0;
  return seen;
}

void launch_seen_keys(const AttnParams& p, const SeenKeys& seen, void* stream) {
  const MaskView& mask = p.mask;
  const int64_t strides = mask.batch_stride | mask.head_stride | mask.q_stride | p.seq_kv;
  const bool chunks = (strides | reinterpret_cast<intptr_t>(mask.data)) % sizeof(Chunk) == 0;
  const auto kernel = chunks ? seen_keys_kernel<Chunk> : seen_keys_kernel<uint8_t>;
  const dim3 grid(seen.blocks, seen.heads, seen.batches);
  kernel<<<grid, kThreads, 0, static_cast<stream_t>(stream)>>>(
      mask, const_cast<SeenRange*>(seen.ranges), static_cast<int>(mask.q_stride ? p.seq_q : 1),
      static_cast<int>(p.seq_kv));
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
