// What a kernel is told: plain data, no torch. Every backend reads these structs.
#pragma once
#include <cstdint>

namespace flash_ext {

enum class DType : int32_t { f16, bf16, f32, f64, b8 };  // b8: a bool mask

// A [batch, heads, seq, head_dim] tensor; head_dim is contiguous. Strides count elements. A packed
// (varlen) tensor [total, heads, head_dim] is the same with batch_stride 0: a sequence then starts
// at row cu_seqlens[b].
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, seq_stride = 0;
  bool operator==(const TensorView&) const = default;
};

// A [batch, heads_q, seq_q, seq_kv] tensor read through strides; 0 where it is broadcast.
struct MaskView {
  void* data = nullptr;  // null: no mask
  DType dtype = DType::b8;
  int64_t batch_stride = 0, head_stride = 0, q_stride = 0, kv_stride = 0;
};

struct AttnParams {
  TensorView q, k, v, o;
  // Acc dtype; [batch, heads_q, seq_q], packed: [heads_q, total_q]; natural log. Null: not wanted.
  void* lse = nullptr;
  int64_t lse_batch_stride = 0, lse_head_stride = 0;

  DType dtype = DType::f32;
  int64_t batch = 0, heads_q = 0, heads_kv = 0;
  int64_t seq_q = 0, seq_kv = 0;    // packed: the longest sequence
  int64_t rows_q = 0, rows_kv = 0;  // of the tensors; packed: of all sequences
  int64_t head_dim = 0, head_dim_v = 0;
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1]; null: dense
  const int32_t* cu_seqlens_k = nullptr;

  double scale = 1.0;
  double softcap = 0.0;                         // 0: none
  int64_t window_left = -1, window_right = -1;  // -1: unbounded; causal is window_right = 0
  bool top_left = false;  // else query seq_q - 1 is aligned with key seq_kv - 1
  MaskView mask;
  const void* alibi_slopes = nullptr;  // acc dtype; [batch, heads_q]
  int64_t alibi_batch_stride = 0;      // 0 for [heads_q]
  const void* sinks = nullptr;         // acc dtype; [heads_q]

  uint32_t dropout_threshold = 0;      // of 65536; 0: no dropout
  const int64_t* rng_state = nullptr;  // [2], seed and offset of Philox, on the tensors' device
};

struct AttnBwdParams : AttnParams {
  TensorView grad_o, dq, dk, dv;
  const void* grad_lse = nullptr;  // as lse, contiguous; null: zero
  void* dmask = nullptr;           // acc dtype, zeroed, the mask's own shape; null: not wanted
  int64_t dmask_batch_stride = 0, dmask_head_stride = 0, dmask_q_stride = 0,
          dmask_kv_stride = 0;  // 0: summed
  void* dsinks = nullptr;       // acc dtype; [heads_q]; null without sinks
};

}  // namespace flash_ext
