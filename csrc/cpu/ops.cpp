// The CPU implementations of the ops.
#include <torch/csrc/stable/library.h>

#include "../attn/args.h"
#include "launch.h"

namespace flash_ext {
namespace {

// deterministic is not read: the CPU backend always is, for a given number of threads.
using Pair = std::tuple<Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Pair run_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
             bool out_bshd, const AttnOptions& options) {
  const FwdCall call = prepare_fwd(q, k, v, packing, out_bshd, options);
  cpu::attn_fwd(call.params);
  return {call.result, call.lse};
}

Pair attn_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window_left,
              int64_t window_right, bool top_left, bool out_bshd, double softcap, double dropout_p,
              const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
              const OptionalTensor& sinks, const OptionalTensor& rng_state,
              bool /*deterministic*/) {
  return run_fwd(q, k, v, nullptr, out_bshd,
                 {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                  alibi_slopes, sinks, rng_state});
}

Pair attn_varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                     const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                     double scale, int64_t window_left, int64_t window_right, bool top_left,
                     double softcap, double dropout_p, const OptionalTensor& attn_mask,
                     const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                     const OptionalTensor& rng_state, bool /*deterministic*/) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return run_fwd(q, k, v, &packing, false,
                 {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                  alibi_slopes, sinks, rng_state});
}

Five run_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
             const Packing* packing, bool need_mask_grad, const AttnOptions& options) {
  const BwdCall call =
      prepare_bwd(grad_out, grad_lse, q, k, v, out, lse, packing, need_mask_grad, options);
  cpu::attn_bwd(call.params);
  return {call.dq, call.dk, call.dv, call.finished_dmask(options.attn_mask), call.dsinks};
}

Five attn_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
              const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
              int64_t window_left, int64_t window_right, bool top_left, double softcap,
              double dropout_p, const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
              const OptionalTensor& sinks, const OptionalTensor& rng_state, bool need_mask_grad,
              bool /*deterministic*/) {
  return run_bwd(grad_out, grad_lse, q, k, v, out, lse, nullptr, need_mask_grad,
                 {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                  alibi_slopes, sinks, rng_state});
}

Five attn_varlen_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
                     const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                     int64_t max_seqlen_k, double scale, int64_t window_left, int64_t window_right,
                     bool top_left, double softcap, double dropout_p,
                     const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                     const OptionalTensor& sinks, const OptionalTensor& rng_state,
                     bool need_mask_grad, bool /*deterministic*/) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return run_bwd(grad_out, grad_lse, q, k, v, out, lse, &packing, need_mask_grad,
                 {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                  alibi_slopes, sinks, rng_state});
}

}  // namespace
}  // namespace flash_ext

STABLE_TORCH_LIBRARY_IMPL(flash_ext, CPU, m) {
  m.impl("attn_fwd", TORCH_BOX(&flash_ext::attn_fwd));
  m.impl("attn_bwd", TORCH_BOX(&flash_ext::attn_bwd));
  m.impl("attn_varlen_fwd", TORCH_BOX(&flash_ext::attn_varlen_fwd));
  m.impl("attn_varlen_bwd", TORCH_BOX(&flash_ext::attn_varlen_bwd));
}
