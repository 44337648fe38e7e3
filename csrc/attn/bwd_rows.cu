// The backward's work on single rows: what the main kernel needs to know of them and zeros for their
// sums, the gradient of the sinks, and dq from float32 sums to the tensors' dtype.
#include "../vendor.h"

#include "../gpu_check.h"
#include "../tile/platform.h"
#include "bwd_sums.h"
#include "load_tile.h"
#include "online_softmax.h"

namespace flash_ext {
namespace {

constexpr int kThreads = 256;
constexpr int kLanesOfRow = 8;  // that read a row together

// Eight values, read or written 16 bytes at a time where they are aligned.
template <typename T>
struct Eight {
  static constexpr int kChunks = 8 * sizeof(T) / sizeof(uint4);
  union {
    T value[8];
    uint4 chunk[kChunks];
  };

  FX_DEVICE Eight() : chunk{} {}
  // The count first ones; the others are zero.
  FX_DEVICE Eight(const T* src, int count, bool in_chunks) : chunk{} {
    if (in_chunks && count >= 8)
      for (int i = 0; i < kChunks; ++i) chunk[i] = reinterpret_cast<const uint4*>(src)[i];
    else
      for (int i = 0; i < 8; ++i)
        if (i < count) value[i] = src[i];
  }
  FX_DEVICE void store(T* dst, int count, bool in_chunks) const {
    if (in_chunks && count >= 8)
      for (int i = 0; i < kChunks; ++i) reinterpret_cast<uint4*>(dst)[i] = chunk[i];
    else
      for (int i = 0; i < 8; ++i)
        if (i < count) dst[i] = value[i];
  }
};

// Where row `index` of (head, query) or (batch, head, query) lies: in tensors, lse, and the
// backward's own order.
struct Row {
  int64_t batch, head, query;  // packed: batch 0, and query counts in all sequences

  FX_DEVICE Row(const AttnParams& p, int64_t index) {
    const int64_t queries = p.cu_seqlens_q ? p.lse_head_stride : p.seq_q;
    query = index % queries, head = index / queries % p.heads_q;
    batch = index / queries / p.heads_q;
  }
  FX_DEVICE int64_t offset(const TensorView& t) const {
    return batch * t.batch_stride + head * t.head_stride + query * t.seq_stride;
  }
  FX_DEVICE int64_t of_group(const BwdArgs& args) const {
    return args.first_row(batch, head / args.pack.by, 0) + query * args.pack.by +
           head % args.pack.by;
  }
};

// args.rows rows in the order of lse.
template <typename T>
__global__ void __launch_bounds__(kThreads) start_kernel(const BwdArgs args) {
  const AttnBwdParams& p = args.params;
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kLanesOfRow;
  const int lane = threadIdx.x % kLanesOfRow;
  const Row row(p, std::min<int64_t>(index, args.rows - 1));  // all lanes take part in the sum
  const T* o = static_cast<const T*>(p.o.data) + row.offset(p.o);
  const T* grad_o = static_cast<const T*>(p.grad_o.data) + row.offset(p.grad_o);
  const int cols = static_cast<int>(p.head_dim_v);
  const bool o_in_chunks = in_chunks(p.o, sizeof(T));
  const bool grad_in_chunks = in_chunks(p.grad_o, sizeof(T));
  float sum = 0.f;
  for (int col = 8 * lane; col < cols; col += 8 * kLanesOfRow) {
    const Eight<T> x(o + col, cols - col, o_in_chunks);
    const Eight<T> y(grad_o + col, cols - col, grad_in_chunks);
    for (int i = 0; i < 8; ++i) sum += to_float(x.value[i]) * to_float(y.value[i]);
  }
  for (int mask = 1; mask < kLanesOfRow; mask *= 2) sum += shuffle_xor(sum, mask);
  if (index >= args.rows) return;
  const int64_t at = row.of_group(args);
  for (int col = 4 * lane; col < args.dq_cols; col += 4 * kLanesOfRow)
    *reinterpret_cast<float4*>(args.dq + at * args.dq_cols + col) = {};
  if (lane != 0) return;
  const float lse = static_cast<const float*>(p.lse)[index];
  const float grad_lse = p.grad_lse ? static_cast<const float*>(p.grad_lse)[index] : 0.f;
  args.stats[at] = {lse == -INFINITY ? INFINITY : lse * kLog2e, sum - grad_lse};
}

// One thread block a head. A sink is a score without a value: its gradient is -weight * delta.
__global__ void __launch_bounds__(kThreads) dsinks_kernel(const BwdArgs args) {
  __shared__ float partial[kThreads];
  const AttnBwdParams& p = args.params;
  const int head = blockIdx.x, kv_head = head / args.pack.by;
  const float sink = static_cast<const float*>(p.sinks)[head] * kLog2e;
  float sum = 0.f;
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const int64_t first_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch] : 0;
    const int64_t seq_q = p.cu_seqlens_q ? p.cu_seqlens_q[batch + 1] - first_q : p.seq_q;
    const RowStats* stats =
        args.stats + args.first_row(batch, kv_head, first_q) + head % args.pack.by;
    for (int64_t i = threadIdx.x; i < seq_q; i += kThreads) {
      const RowStats row = stats[i * args.pack.by];
      const float weight = fast_exp2(sink - row.lse);
      if (weight != 0.f) sum -= weight * row.delta;
    }
  }
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // the sums of the round before are there
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<float*>(p.dsinks)[head] = partial[0];
}

// In how many pieces of eight columns a row of dq is written.
constexpr int dq_chunks(const AttnBwdParams& p) { return static_cast<int>((p.head_dim + 7) / 8); }

// A thread each.
template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const BwdArgs args) {
  const AttnBwdParams& p = args.params;
  const int chunks = dq_chunks(p);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= args.rows * chunks) return;
  const Row row(p, index / chunks);
  const int col = static_cast<int>(index % chunks) * 8;
  const int64_t from = row.of_group(args);
  const float* src =
      args.dq + from * args.dq_cols + (col ^ static_cast<int>(from % 4) * args.dq_flip);
  Eight<T> result;
  for (int i = 0; i < 8; ++i) result.value[i] = from_float<T>(src[i] * static_cast<float>(p.scale));
  T* dst = static_cast<T*>(p.dq.data) + row.offset(p.dq) + col;
  result.store(dst, static_cast<int>(p.head_dim) - col, in_chunks(p.dq, sizeof(T)));
}

// f(a T) for the type of the tensors.
template <typename F>
void with_element(DType dtype, F f) {
  if (dtype == DType::f16) f(half_t{});
  else if (dtype == DType::bf16) f(bf16_t{});
  else f(float{});
}

unsigned blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  FX_CHECK(blocks < int64_t{1} << 31, "q: too many rows for one call");
  return static_cast<unsigned>(blocks);
}

}  // namespace

void launch_bwd_start(const BwdSums& sums, void* stream) {
  const BwdArgs& args = sums.args;
  if (args.rows == 0) return;
  if (args.turns)
    FX_CUDA_CHECK(
        cudaMemsetAsync(args.turns, 0, sums.turns() * sizeof(int), static_cast<stream_t>(stream)));
  with_element(args.params.dtype, [&](auto element) {
    start_kernel<decltype(element)>
        <<<blocks_for(args.rows * kLanesOfRow), kThreads, 0, static_cast<stream_t>(stream)>>>(args);
  });
  FX_CUDA_CHECK(cudaGetLastError());
}

void launch_bwd_dsinks(const BwdArgs& args, void* stream) {
  if (!args.params.dsinks) return;
  const unsigned heads = static_cast<unsigned>(args.params.heads_q);
  dsinks_kernel<<<heads, kThreads, 0, static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

void launch_bwd_finish(const BwdArgs& args, void* stream) {
  if (args.rows == 0) return;
  with_element(args.params.dtype, [&](auto element) {
    finish_kernel<decltype(element)><<<blocks_for(args.rows * dq_chunks(args.params)), kThreads, 0,
                                       static_cast<stream_t>(stream)>>>(args);
  });
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
