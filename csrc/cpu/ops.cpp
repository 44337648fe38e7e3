// The CPU implementations of the ops.
#include <torch/csrc/stable/library.h>

#include "../attn/ops.h"
#include "launch.h"

namespace flash_ext {
namespace {

Pair run_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
             bool out_bshd, const AttnOptions& options) {
  const FwdCall call = prepare_fwd(q, k, v, packing, out_bshd, options);
  cpu::attn_fwd(call.params);
  return {call.result, call.lse};
}

// deterministic is not read: this backend always is, for a given number of threads.
Five run_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
             const Packing* packing, bool need_mask_grad, bool /*deterministic*/,
             const AttnOptions& options) {
  const BwdCall call =
      prepare_bwd(grad_out, grad_lse, q, k, v, out, lse, packing, need_mask_grad, options);
  cpu::attn_bwd(call.params);
  return {call.dq, call.dk, call.dv, call.finished_dmask(options.attn_mask), call.dsinks};
}

using CpuOps = Ops<run_fwd, run_bwd>;

}  // namespace
}  // namespace flash_ext

STABLE_TORCH_LIBRARY_IMPL(flash_ext, CPU, m) {
  m.impl("attn_fwd", TORCH_BOX(&flash_ext::CpuOps::attn_fwd));
  m.impl("attn_plain", TORCH_BOX(&flash_ext::CpuOps::attn_plain));
  m.impl("attn_plain_bwd", TORCH_BOX(&flash_ext::CpuOps::attn_plain_bwd));
  m.impl("attn_bwd", TORCH_BOX(&flash_ext::CpuOps::attn_bwd));
  m.impl("attn_varlen_fwd", TORCH_BOX(&flash_ext::CpuOps::attn_varlen_fwd));
  m.impl("attn_varlen_bwd", TORCH_BOX(&flash_ext::CpuOps::attn_varlen_bwd));
}
