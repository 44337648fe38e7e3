// The ops as their schemas have them (csrc/bindings.cpp), for a backend that is two functions:
//   Pair fwd(q, k, v, packing or null, out_bshd, options)
//   Five bwd(grad_out, grad_lse, q, k, v, out, lse, packing or null, need_mask_grad, deterministic,
//            options), with dmask and dsinks where they are wanted
#pragma once
#include "args.h"

namespace flash_ext {

using Pair = std::tuple<Tensor, Tensor>;                          // out, lse
using Three = std::tuple<Tensor, Tensor, Tensor>;                 // dq, dk, dv
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dmask, dsinks

// An op returns tensors: without elements where a gradient is not wanted.
inline Five all_defined(Five gradients, const Tensor& q) {
  auto& [dq, dk, dv, dmask, dsinks] = gradients;
  if (!dmask.defined()) dmask = no_elements(q);
  if (!dsinks.defined()) dsinks = no_elements(q);
  return gradients;
}

template <auto kFwd, auto kBwd>
struct Ops {
  static Pair attn_fwd(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                       int64_t window_left, int64_t window_right, bool top_left, bool out_bshd,
                       double softcap, double dropout_p, const OptionalTensor& attn_mask,
                       const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                       const OptionalTensor& rng_state, bool /*deterministic: always*/,
                       int64_t kernels) {
    return kFwd(q, k, v, nullptr, out_bshd,
                {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                 alibi_slopes, sinks, rng_state, static_cast<Kernels>(kernels)});
  }

  static Tensor attn_plain(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                           int64_t window_left, int64_t window_right, bool top_left,
                           bool out_bshd) {
    const OptionalTensor none;
    return std::get<0>(kFwd(q, k, v, nullptr, out_bshd,
                            {scale, 0.0, 0.0, window_left, window_right, top_left, none, none, none,
                             none, Kernels::fastest, false}));
  }

  static Pair attn_varlen_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                              const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                              int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                              int64_t window_left, int64_t window_right, bool top_left,
                              double softcap, double dropout_p, const OptionalTensor& attn_mask,
                              const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                              const OptionalTensor& rng_state, bool /*deterministic: always*/,
                              int64_t kernels) {
    const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
    return kFwd(q, k, v, &packing, false,
                {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
                 alibi_slopes, sinks, rng_state, static_cast<Kernels>(kernels)});
  }

  static Five attn_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
                       const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                       double scale, int64_t window_left, int64_t window_right, bool top_left,
                       double softcap, double dropout_p, const OptionalTensor& attn_mask,
                       const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                       const OptionalTensor& rng_state, bool need_mask_grad, bool deterministic,
                       int64_t kernels) {
    return all_defined(
        kBwd(grad_out, grad_lse, q, k, v, out, lse, nullptr, need_mask_grad, deterministic,
             {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
              alibi_slopes, sinks, rng_state, static_cast<Kernels>(kernels)}),
        q);
  }

  static Three attn_plain_bwd(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                              const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
                              int64_t window_left, int64_t window_right, bool top_left,
                              bool deterministic) {
    const OptionalTensor none;
    auto [dq, dk, dv, dmask, dsinks] =
        kBwd(grad_out, none, q, k, v, out, lse, nullptr, false, deterministic,
             {scale, 0.0, 0.0, window_left, window_right, top_left, none, none, none, none});
    return {dq, dk, dv};
  }

  static Five attn_varlen_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse,
                              const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                              const Tensor& lse, const Tensor& cu_seqlens_q,
                              const Tensor& cu_seqlens_k, int64_t max_seqlen_q,
                              int64_t max_seqlen_k, double scale, int64_t window_left,
                              int64_t window_right, bool top_left, double softcap, double dropout_p,
                              const OptionalTensor& attn_mask, const OptionalTensor& alibi_slopes,
                              const OptionalTensor& sinks, const OptionalTensor& rng_state,
                              bool need_mask_grad, bool deterministic, int64_t kernels) {
    const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
    return all_defined(
        kBwd(grad_out, grad_lse, q, k, v, out, lse, &packing, need_mask_grad, deterministic,
             {scale, softcap, dropout_p, window_left, window_right, top_left, attn_mask,
              alibi_slopes, sinks, rng_state, static_cast<Kernels>(kernels)}),
        q);
  }
};

}  // namespace flash_ext
