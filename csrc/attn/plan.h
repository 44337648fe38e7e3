// What the plans of the GPU forward and backward have in common.
#pragma once
#include <algorithm>
#include <iterator>
#include <type_traits>

#include "../checks.h"
#include "gpu_facts.h"
#include "load_tile.h"
#include "seen_keys.h"

namespace flash_ext {

// The head_dims that kernels are compiled for; others are filled up with zeros.
inline constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The smallest of the head_dims that kernels are compiled for that holds these tensors' columns.
template <size_t kCount>
int compiled_head_dim(const AttnParams& p, const int (&head_dims)[kCount]) {
  const int64_t wide = std::max<int64_t>(p.head_dim, p.head_dim_v);
  const int* head_dim = std::lower_bound(std::begin(head_dims), std::end(head_dims), wide);
  FX_CHECK(head_dim != std::end(head_dims), "q: expected head_dim of at most 256, got ", wide);
  return *head_dim;
}

// Of the portable kernels, for tensors whose sizes are checked.
inline int head_dim_of_kernel(const AttnParams& p) {
  const int head_dim = compiled_head_dim(p, kHeadDims);
  FX_CHECK(p.dtype != DType::f64, "q: expected float16, bfloat16 or float32 on a GPU");
  constexpr int64_t kMostRows = int64_t{1} << 29;
  const int64_t pack = p.heads_q / std::max<int64_t>(p.heads_kv, 1);
  FX_CHECK(p.seq_q * pack < kMostRows && p.seq_kv < kMostRows,
           "q, k: expected sequences below 2^29 rows");
  return head_dim;
}

// Of `heads` of which `sharing` each share a KV head: how many have K and V that fit half of the L2
// cache together.
inline int heads_in_cache(const AttnParams& p, const GpuFacts& gpu, int64_t heads,
                          int64_t sharing) {
  const int64_t kv_bytes =
      std::max<int64_t>(p.seq_kv * (p.head_dim + p.head_dim_v) * element_bytes(p.dtype), 1);
  return static_cast<int>(std::clamp<int64_t>(gpu.l2_bytes / 2 / kv_bytes * sharing, sharing,
                                              std::max<int64_t>(heads, 1)));
}

// Which ranges of keys are worth finding; count() is 0 where none are.
SeenKeys plan_seen_keys(const AttnParams& params);
// Finds them, into seen.ranges.
void launch_seen_keys(const AttnParams& params, const SeenKeys& seen, void* stream);

// Rows that cannot be read or written 16 bytes at a time, and options that change scores.
inline bool needs_general(const AttnParams& p, std::initializer_list<TensorView> tensors) {
  const int bytes = element_bytes(p.dtype);
  bool chunks = p.head_dim * bytes % 16 == 0 && p.head_dim_v * bytes % 16 == 0;
  for (const TensorView& t : tensors) chunks = chunks && in_chunks(t, bytes);
  return !chunks || p.mask.data || p.softcap > 0 || p.alibi_slopes || p.dropout_threshold;
}

template <int kHeadDim>
using HeadDim = std::integral_constant<int, kHeadDim>;

// f(dtype, head_dim), which both are constants to it.
template <DType kDType, typename F>
auto with_head_dim(int head_dim, F f) {
  constexpr std::integral_constant<DType, kDType> dtype;
  switch (head_dim) {
    case 32: return f(dtype, HeadDim<32>{});
    case 64: return f(dtype, HeadDim<64>{});
    case 96: return f(dtype, HeadDim<96>{});
    case 128: return f(dtype, HeadDim<128>{});
    case 192: return f(dtype, HeadDim<192>{});
    default: return f(dtype, HeadDim<256>{});
  }
}
template <typename F>
auto with_constants(DType dtype, int head_dim, F f) {
  switch (dtype) {
    case DType::f16: return with_head_dim<DType::f16>(head_dim, f);
    case DType::bf16: return with_head_dim<DType::bf16>(head_dim, f);
    default: return with_head_dim<DType::f32>(head_dim, f);
  }
}

}  // namespace flash_ext
