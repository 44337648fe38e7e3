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

  FX_DEVICE Row(const AttnParams& p, unsigned index) {
    const unsigned queries = static_cast<unsigned>(p.cu_seqlens_q ? p.lse_head_stride : p.seq_q);
    const unsigned heads = static_cast<unsigned>(p.heads_q), heads_before = index / queries;
    query = index % queries, head = heads_before % heads, batch = heads_before / heads;
  }
  FX_DEVICE int64_t offset(const TensorView& t) const {
    return batch * t.batch_stride + head * t.head_stride + query * t.seq_stride;
  }
  FX_DEVICE int64_t of_group(const BwdArgs& args) const {
    return args.first_row(batch, head / args.pack.by, 0) + query * args.pack.by +
           head % args.pack.by;
  }
};

// The main kernel goes through heads from the first to the last. So here the first ones come last, whose
// zeros then are in the L2 cache, and afterwards the last ones first, whose sums are.
FX_DEVICE unsigned last_first() { return gridDim.x - 1 - blockIdx.x; }

// args.rows rows in the order of lse.
template <typename T>
__global__ void __launch_bounds__(kThreads) start_kernel(const BwdArgs args) {
  const AttnBwdParams& p = args.params;
  const unsigned rows = static_cast<unsigned>(args.rows);
  const unsigned index = last_first() * (kThreads / kLanesOfRow) + threadIdx.x / kLanesOfRow;
  const int lane = threadIdx.x % kLanesOfRow;
  const Row row(p, std::min<unsigned>(index, rows - 1));  // all lanes take part in the sum
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
  if (index >= rows) return;
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

// How many threads write a row of dq, eight columns each, and how many rows a thread block writes.
constexpr unsigned threads_of_row(const AttnBwdParams& p) {
  return static_cast<unsigned>((p.head_dim + 15) / 16 * 2);
}
constexpr unsigned rows_of_block(const AttnBwdParams& p) { return kThreads / threads_of_row(p); }

// Where the sums of eight columns of a row are.
FX_DEVICE const float* sums_of(const BwdArgs& args, int64_t row, int col) {
  if (!args.dq_paired)
    return args.dq + row * args.dq_cols + (col ^ static_cast<int>(row % 4) * args.dq_flip);
  constexpr int kPanel = BwdArgs::kDqPanel;
  const int in_panel = col % kPanel, first = col - in_panel;
  const int cols = std::min<int>(args.dq_cols - first, kPanel);
  const int flip = static_cast<int>(row % 2) * dq_flip(cols);
  return args.dq + args.rows * first + row * cols + (in_panel ^ flip);
}

// BwdArgs::dq_paired: two neighbouring lanes read the sums of 16 columns, eight of them each, and then
// exchange half, so that each has eight neighbouring columns.
FX_DEVICE void exchange_pairs(float* x, bool second) {
  float y[8];
  for (int i = 0; i < 4; ++i) {
    const int at = i / 2 * 4 + i % 2;  // of the eight first columns; two on it is of the eight last
    const float other = shuffle_xor(second ? x[at] : x[at + 2], 1);
    y[i] = second ? other : x[at], y[i + 4] = second ? x[at + 2] : other;
  }
  for (int i = 0; i < 8; ++i) x[i] = y[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const BwdArgs args) {
  const AttnBwdParams& p = args.params;
  const unsigned rows = static_cast<unsigned>(args.rows), threads = threads_of_row(p);
  const unsigned in_block = threadIdx.x / threads;
  const unsigned index = last_first() * rows_of_block(p) + in_block;
  const int col = static_cast<int>(threadIdx.x % threads) * 8;
  const Row row(p, std::min<unsigned>(index, rows - 1));  // all lanes take part in the exchange
  const int64_t from = row.of_group(args);
  const float* src = sums_of(args, from, col);
  float x[8] = {};
  if (col < args.dq_cols)
    for (int i = 0; i < 8; i += 4)
      *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(src + i);
  if (args.dq_paired) exchange_pairs(x, col % 16 != 0);
  if (index >= rows || in_block >= rows_of_block(p)) return;
  Eight<T> result;
  for (int i = 0; i < 8; ++i) result.value[i] = from_float<T>(x[i] * static_cast<float>(p.scale));
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

// Thread blocks for all rows.
unsigned blocks_for(const BwdArgs& args, int64_t rows_of_block) {
  FX_CHECK(args.rows < int64_t{1} << 31, "q: too many rows for one call");
  return static_cast<unsigned>((args.rows + rows_of_block - 1) / rows_of_block);
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
        <<<blocks_for(args, kThreads / kLanesOfRow), kThreads, 0, static_cast<stream_t>(stream)>>>(
            args);
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
    finish_kernel<decltype(element)><<<blocks_for(args, rows_of_block(args.params)), kThreads, 0,
                                       static_cast<stream_t>(stream)>>>(args);
  });
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext
