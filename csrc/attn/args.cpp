#include "args.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../checks.h"

namespace flash_ext {
namespace {

using torch::headeronly::ScalarType;
namespace stable = torch::stable;

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Bool: return DType::b8;
    default:
      FX_CHECK(false, name, ": expected float16, bfloat16, float32 or float64, got ",
               torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return ScalarType::Half;
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f64: return ScalarType::Double;
    case DType::b8: return ScalarType::Bool;
    default: return ScalarType::Float;
  }
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f64: return "float64";
    case DType::b8: return "bool";
    default: return "float32";
  }
}

DType acc_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t d = 0; d < t.dim(); ++d) sizes[d] = t.size(d);
  return sizes;
}

std::string text_of(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

void check_rank(const Tensor& t, const char* name, int64_t rank, const char* shape) {
  FX_CHECK(t.dim() == rank, name, ": expected ", shape, ", got ", text_of(sizes_of(t)));
}

void check_same_device(const Tensor& t, const char* name, const Tensor& q) {
  FX_CHECK(t.device() == q.device(), name,
           ": expected a tensor on the device of q, got one on another device");
}

void check_dtype(const Tensor& t, const char* name, DType expected, const char* why) {
  const DType got = dtype_of(t, name);
  FX_CHECK(got == expected, name, ": expected ", name_of(expected), why, ", got ", name_of(got));
}

// t, or a copy whose last dimension is contiguous.
Tensor with_contiguous_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : stable::contiguous(t);
}

TensorView view_of(const Tensor& t, bool packed) {
  if (packed) return {t.data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes,
             const std::vector<int64_t>& strides, DType dtype) {
  AtenTensorHandle handle;
  int32_t device_type, device_index, type = 0;
  aoti_torch_get_device_type(like.get(), &device_type);
  aoti_torch_get_device_index(like.get(), &device_index);
  switch (dtype) {
    case DType::f16: type = aoti_torch_dtype_float16(); break;
    case DType::bf16: type = aoti_torch_dtype_bfloat16(); break;
    case DType::f64: type = aoti_torch_dtype_float64(); break;
    default: type = aoti_torch_dtype_float32(); break;
  }
  FX_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, device_type,
                                    device_index, &handle) == 0,
           "out: could not be allocated");
  return Tensor(handle);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, DType dtype) {
  return empty(like, sizes, contiguous_strides(sizes), dtype);
}

// With the strides of torch's empty_like: t's own where its elements lie side by side, else such that
// they do, in the same order of dimensions. That function goes through the dispatcher by its name,
// which takes longer than the allocation; it is left what has no clear order, expanded dimensions.
Tensor empty_like(const Tensor& t, DType dtype) {
  const std::vector<int64_t> sizes = sizes_of(t);
  const int64_t rank = t.dim();
  std::vector<int64_t> strides(rank), inner_first(rank);
  for (int64_t d = 0; d < rank; ++d) {
    strides[d] = t.stride(d);
    inner_first[d] = rank - 1 - d;
    if (strides[d] == 0 || sizes[d] == 0) return stable::empty_like(t);
  }
  std::stable_sort(inner_first.begin(), inner_first.end(), [&](int64_t a, int64_t b) {
    return std::pair(strides[a], sizes[a]) < std::pair(strides[b], sizes[b]);
  });
  std::vector<int64_t> dense(rank);
  bool is_dense = true;
  int64_t stride = 1;
  for (int64_t d : inner_first) {
    is_dense = is_dense && (sizes[d] == 1 || strides[d] == stride);
    dense[d] = stride;
    stride *= sizes[d];
  }
  return empty(t, sizes, is_dense ? strides : dense, dtype);
}

// q, k, v against each other; fills the sizes and views.
void read_qkv(const Tensor& q, const Tensor& k, const Tensor& v, bool packed, AttnParams& p) {
  const int64_t rank = packed ? 3 : 4, heads = 1, dim = rank - 1;
  check_rank(q, "q", rank,
             packed ? "[total_q, heads_q, head_dim]" : "[batch, heads_q, seq_q, head_dim]");
  check_rank(k, "k", rank,
             packed ? "[total_k, heads_kv, head_dim]" : "[batch, heads_kv, seq_kv, head_dim]");
  check_rank(v, "v", rank,
             packed ? "[total_k, heads_kv, head_dim_v]" : "[batch, heads_kv, seq_kv, head_dim_v]");
  p.dtype = dtype_of(q, "q");
  FX_CHECK(p.dtype != DType::b8, "q: expected float16, bfloat16, float32 or float64, got bool");
  check_same_device(k, "k", q);
  check_same_device(v, "v", q);
  check_dtype(k, "k", p.dtype, " as q");
  check_dtype(v, "v", p.dtype, " as q");

  p.heads_q = q.size(heads);
  p.heads_kv = k.size(heads);
  p.head_dim = q.size(dim);
  p.head_dim_v = v.size(dim);
  FX_CHECK(p.head_dim > 0, "q: expected head_dim of at least 1, got 0");
  FX_CHECK(p.head_dim_v > 0, "v: expected head_dim of at least 1, got 0");
  FX_CHECK(k.size(dim) == p.head_dim, "k: expected head_dim ", p.head_dim, " as in q, got ",
           k.size(dim));
  FX_CHECK(v.size(heads) == p.heads_kv, "v: expected ", p.heads_kv, " heads as in k, got ",
           v.size(heads));
  FX_CHECK(p.heads_kv > 0 ? p.heads_q % p.heads_kv == 0 : p.heads_q == 0,
           "k: expected a number of heads that divides ", p.heads_q, ", the heads of q, got ",
           p.heads_kv);
  if (packed) {
    FX_CHECK(v.size(0) == k.size(0), "v: expected total_k ", k.size(0), " as in k, got ",
             v.size(0));
  } else {
    p.batch = q.size(0);
    p.seq_q = p.rows_q = q.size(2);
    p.seq_kv = p.rows_kv = k.size(2);
    FX_CHECK(k.size(0) == p.batch, "k: expected batch ", p.batch, " as in q, got ", k.size(0));
    FX_CHECK(v.size(0) == p.batch, "v: expected batch ", p.batch, " as in q, got ", v.size(0));
    FX_CHECK(v.size(2) == p.seq_kv, "v: expected seq_kv ", p.seq_kv, " as in k, got ", v.size(2));
  }
  // Work is counted in doubles and rows of a KV head in int64: both are far from their ends below this.
  constexpr int64_t kMost = int64_t{1} << 40;
  for (const Tensor* t : {&q, &k, &v})
    for (int64_t d = 0; d < rank; ++d)
      FX_CHECK(t->size(d) < kMost, "q, k, v: expected sizes below 2^40");
}

const int32_t* read_cu_seqlens(const Tensor& cu, const char* name, const Tensor& q, int64_t total,
                               const char* total_name, int64_t max_seqlen, const char* max_name) {
  FX_CHECK(cu.dim() == 1 && cu.size(0) >= 1, name, ": expected [batch + 1], got ",
           text_of(sizes_of(cu)));
  FX_CHECK(cu.scalar_type() == ScalarType::Int, name, ": expected int32, got ",
           torch::headeronly::toString(cu.scalar_type()));
  check_same_device(cu, name, q);
  FX_CHECK(cu.size(0) == 1 || cu.stride(0) == 1, name, ": expected a contiguous tensor");
  FX_CHECK(max_seqlen >= 0, max_name, ": expected 0 or more, got ", max_seqlen);
  const int32_t* starts = static_cast<const int32_t*>(cu.data_ptr());
  if (!q.is_cpu())
    return starts;  // on a GPU the values are trusted: reading them would wait for the device
  FX_CHECK(starts[0] == 0, name, ": expected to start with 0, got ", starts[0]);
  const int64_t batch = cu.size(0) - 1;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{starts[b + 1]} - starts[b];
    FX_CHECK(length >= 0, name, ": expected values that do not decrease, got ", starts[b],
             " before ", starts[b + 1]);
    FX_CHECK(length <= max_seqlen, max_name, ": expected at least ", length,
             ", the length of sequence ", b, ", got ", max_seqlen);
  }
  FX_CHECK(starts[batch] == total, name, ": expected to end with ", total_name, " = ", total,
           ", got ", starts[batch]);
  return starts;
}

void read_packing(const Tensor& q, const Tensor& k, const Packing& packing, AttnParams& p) {
  p.cu_seqlens_q = read_cu_seqlens(packing.cu_seqlens_q, "cu_seqlens_q", q, q.size(0), "total_q",
                                   packing.max_seqlen_q, "max_seqlen_q");
  p.cu_seqlens_k = read_cu_seqlens(packing.cu_seqlens_k, "cu_seqlens_k", q, k.size(0), "total_k",
                                   packing.max_seqlen_k, "max_seqlen_k");
  FX_CHECK(packing.cu_seqlens_k.size(0) == packing.cu_seqlens_q.size(0), "cu_seqlens_k: expected ",
           packing.cu_seqlens_q.size(0), " values as in cu_seqlens_q, got ",
           packing.cu_seqlens_k.size(0));
  p.batch = packing.cu_seqlens_q.size(0) - 1;
  p.seq_q = packing.max_seqlen_q;
  p.seq_kv = packing.max_seqlen_k;
  p.rows_q = q.size(0);
  p.rows_kv = k.size(0);
}

void read_options(const Tensor& q, const AttnOptions& o, AttnParams& p) {
  FX_CHECK(std::isfinite(o.scale) && o.scale >= 0,
           "scale: expected a finite number of at least 0, got ", o.scale);
  FX_CHECK(std::isfinite(o.softcap) && o.softcap >= 0,
           "softcap: expected a finite number of at least 0, got ", o.softcap);
  FX_CHECK(o.dropout_p >= 0 && o.dropout_p < 1, "dropout_p: expected a number in [0, 1), got ",
           o.dropout_p);
  FX_CHECK(o.window_left >= -1, "window: expected -1 or more to the left, got ", o.window_left);
  FX_CHECK(o.window_right >= -1, "window: expected -1 or more to the right, got ", o.window_right);
  p.scale = o.scale;
  p.softcap = o.softcap;
  p.window_left = o.window_left;
  p.window_right = o.window_right;
  p.top_left = o.top_left;
  const DType acc = acc_dtype(p.dtype);

  if (o.attn_mask) {
    const Tensor& m = *o.attn_mask;
    const int64_t full[4] = {p.batch, p.heads_q, p.seq_q, p.seq_kv};
    bool fits = m.dim() == 4;
    for (int64_t d = 0; fits && d < 4; ++d) fits = m.size(d) == full[d] || m.size(d) == 1;
    FX_CHECK(fits, "attn_mask: expected a shape that broadcasts to [", full[0], ", ", full[1], ", ",
             full[2], ", ", full[3], "], got ", text_of(sizes_of(m)));
    check_same_device(m, "attn_mask", q);
    const auto stride = [&](int64_t d) { return m.size(d) == 1 ? 0 : m.stride(d); };
    p.mask = {m.data_ptr(), dtype_of(m, "attn_mask"), stride(0), stride(1), stride(2), stride(3)};
    if (m.numel() == 0) p.mask.data = nullptr;  // nothing reads it
  }
  if (o.alibi_slopes) {
    const Tensor& a = *o.alibi_slopes;
    FX_CHECK((a.dim() == 1 && a.size(0) == p.heads_q) ||
                 (a.dim() == 2 && a.size(0) == p.batch && a.size(1) == p.heads_q),
             "alibi_slopes: expected [", p.heads_q, "] or [", p.batch, ", ", p.heads_q, "], got ",
             text_of(sizes_of(a)));
    check_same_device(a, "alibi_slopes", q);
    check_dtype(a, "alibi_slopes", acc, "");
    FX_CHECK(a.numel() <= 1 || a.is_contiguous(), "alibi_slopes: expected a contiguous tensor");
    p.alibi_slopes = a.data_ptr();
    p.alibi_batch_stride = a.dim() == 2 ? p.heads_q : 0;
  }
  if (o.sinks) {
    const Tensor& s = *o.sinks;
    FX_CHECK(s.dim() == 1 && s.size(0) == p.heads_q, "sinks: expected [", p.heads_q, "], got ",
             text_of(sizes_of(s)));
    check_same_device(s, "sinks", q);
    check_dtype(s, "sinks", acc, "");
    FX_CHECK(s.numel() <= 1 || s.is_contiguous(), "sinks: expected a contiguous tensor");
    p.sinks = s.data_ptr();
  }
  FX_CHECK((o.dropout_p > 0) == o.rng_state.has_value(),
           "rng_state: expected exactly when dropout_p is above 0");
  if (o.rng_state) {
    const Tensor& r = *o.rng_state;
    FX_CHECK(
        r.dim() == 1 && r.size(0) == 2 && r.scalar_type() == ScalarType::Long && r.is_contiguous(),
        "rng_state: expected int64 [2], contiguous, got ",
        torch::headeronly::toString(r.scalar_type()), " ", text_of(sizes_of(r)));
    check_same_device(r, "rng_state", q);
    p.dropout_threshold = uint32_t(std::min<double>(std::nearbyint(o.dropout_p * 65536), 65535));
    p.rng_state = static_cast<const int64_t*>(r.data_ptr());
  }
}

template <typename Params>
void prepare(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
             const AttnOptions& options, Prepared<Params>& call) {
  Params& p = call.params;
  read_qkv(q, k, v, packing != nullptr, p);
  if (packing) read_packing(q, k, *packing, p);
  read_options(q, options, p);
  call.q = with_contiguous_rows(q);
  call.k = with_contiguous_rows(k);
  call.v = with_contiguous_rows(v);
  p.q = view_of(call.q, packing);
  p.k = view_of(call.k, packing);
  p.v = view_of(call.v, packing);
}

// It is contiguous; where there is none, its rows are numbered all the same.
void set_lse(void* lse, bool packed, AttnParams& p) {
  p.lse = lse;
  p.lse_head_stride = packed ? p.rows_q : p.seq_q;
  p.lse_batch_stride = packed ? 0 : p.heads_q * p.seq_q;
}

std::vector<int64_t> out_sizes(const Tensor& q, int64_t head_dim_v) {
  std::vector<int64_t> sizes = sizes_of(q);
  sizes.back() = head_dim_v;
  return sizes;
}

std::vector<int64_t> lse_sizes(const Tensor& q, bool packed) {
  if (packed) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(1), q.size(2)};
}

void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (size_t d = 0; same && d < sizes.size(); ++d) same = t.size(d) == sizes[d];
  FX_CHECK(same, name, ": expected ", text_of(sizes), ", got ", text_of(sizes_of(t)));
}

}  // namespace

FwdCall prepare_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
                    bool out_bshd, const AttnOptions& options) {
  FwdCall call;
  AttnParams& p = call.params;
  prepare(q, k, v, packing, options, call);
  const std::vector<int64_t> sizes = out_sizes(q, p.head_dim_v);
  if (out_bshd) {
    const int64_t row = p.head_dim_v, token = std::max<int64_t>(p.heads_q, 1) * row;
    call.result = empty(q, sizes, {std::max<int64_t>(p.seq_q, 1) * token, row, token, 1}, p.dtype);
  } else {
    call.result = empty(q, sizes, p.dtype);
  }
  if (options.need_lse) call.lse = empty(q, lse_sizes(q, packing), acc_dtype(p.dtype));
  p.o = view_of(call.result, packing);
  set_lse(options.need_lse ? call.lse.data_ptr() : nullptr, packing, p);
  return call;
}

BwdCall prepare_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
                    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                    const Packing* packing, bool need_mask_grad, const AttnOptions& options) {
  BwdCall call;
  AttnBwdParams& p = call.params;
  prepare(q, k, v, packing, options, call);
  const DType acc = acc_dtype(p.dtype);
  for (const auto& [t, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_shape(*t, name, out_sizes(q, p.head_dim_v));
    check_same_device(*t, name, q);
    check_dtype(*t, name, p.dtype, " as q");
  }
  check_shape(lse, "lse", lse_sizes(q, packing));
  check_same_device(lse, "lse", q);
  check_dtype(lse, "lse", acc, "");
  FX_CHECK(lse.is_contiguous(), "lse: expected a contiguous tensor");
  call.grad_out = with_contiguous_rows(grad_out);
  call.out = with_contiguous_rows(out);
  p.grad_o = view_of(call.grad_out, packing);
  p.o = view_of(call.out, packing);
  set_lse(lse.data_ptr(), packing, p);
  if (grad_lse) {
    check_shape(*grad_lse, "grad_lse", lse_sizes(q, packing));
    check_same_device(*grad_lse, "grad_lse", q);
    check_dtype(*grad_lse, "grad_lse", acc, "");
    call.grad_lse = grad_lse->is_contiguous() ? *grad_lse : stable::contiguous(*grad_lse);
    p.grad_lse = call.grad_lse.data_ptr();
  }

  // As the caller's tensors lie in memory, unless their elements overlap or are spread out.
  call.dq = empty_like(q, p.dtype);
  call.dk = empty_like(k, p.dtype);
  call.dv = empty_like(v, p.dtype);
  const auto writable = [&](Tensor& t) {
    const int64_t last = t.dim() - 1;
    if (t.size(last) > 1 && t.stride(last) != 1) t = empty(t, out_sizes(t, t.size(last)), p.dtype);
    return view_of(t, packing);
  };
  p.dq = writable(call.dq);
  p.dk = writable(call.dk);
  p.dv = writable(call.dv);

  if (need_mask_grad) {
    FX_CHECK(options.attn_mask && dtype_of(*options.attn_mask, "attn_mask") != DType::b8,
             "need_mask_grad: expected only with a floating-point attn_mask");
    const Tensor& m = *options.attn_mask;
    const std::vector<int64_t> sizes = {m.size(0), m.size(1), m.size(2), m.size(3)};
    call.dmask = stable::new_zeros(q, sizes, scalar_type_of(acc));
    const auto stride = [&](int64_t d) { return sizes[d] == 1 ? 0 : call.dmask.stride(d); };
    if (m.numel() > 0) p.dmask = call.dmask.data_ptr();
    p.dmask_batch_stride = stride(0);
    p.dmask_head_stride = stride(1);
    p.dmask_q_stride = stride(2);
    p.dmask_kv_stride = stride(3);
  }
  if (options.sinks) {
    call.dsinks = empty(q, {p.heads_q}, acc);
    p.dsinks = call.dsinks.data_ptr();
  }
  return call;
}

Tensor BwdCall::finished_dmask(const OptionalTensor& attn_mask) const {
  if (!dmask.defined() || dmask.scalar_type() == attn_mask->scalar_type()) return dmask;
  return torch::stable::to(dmask, attn_mask->scalar_type());
}

Tensor no_elements(const Tensor& like) { return empty(like, {0}, acc_dtype(dtype_of(like, "q"))); }

Tensor floats(const Tensor& like, int64_t count) { return empty(like, {count}, DType::f32); }

}  // namespace flash_ext
