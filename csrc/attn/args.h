// From tensors to parameter structs: every check of an op's arguments is made here, once, for all
// backends. The ops are described in docs/design.md, section 7.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "params.h"

namespace flash_ext {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Which of a GPU's kernels are to run: the fastest, or only those of one family.
enum class Kernels : int64_t { fastest, portable, hopper };

// The options that all ops share, in the schema's names.
struct AttnOptions {
  double scale, softcap, dropout_p;
  int64_t window_left, window_right;
  bool top_left;
  const OptionalTensor &attn_mask, &alibi_slopes, &sinks, &rng_state;
  Kernels kernels = Kernels::fastest;
  bool need_lse = true;
};

// How packed tensors are divided into sequences.
struct Packing {
  const Tensor &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
};

// Parameters that point into tensors, and the tensors that must live as long.
template <typename Params>
struct Prepared {
  Params params;
  Tensor q, k, v, grad_out, out, grad_lse;  // with contiguous rows: the caller's or copies
};

struct FwdCall : Prepared<AttnParams> {
  Tensor result, lse;  // lse: where it is needed
};
struct BwdCall : Prepared<AttnBwdParams> {
  Tensor dq, dk, dv, dmask, dsinks;  // dmask, dsinks: where they are wanted
  // dmask in the mask's own dtype.
  Tensor finished_dmask(const OptionalTensor& attn_mask) const;
};

FwdCall prepare_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
                    bool out_bshd, const AttnOptions& options);
BwdCall prepare_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
                    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                    const Packing* packing, bool need_mask_grad, const AttnOptions& options);

// What an op returns in a tensor's place: of the dtype of lse.
Tensor no_elements(const Tensor& q);
// float32 [count], not initialised.
Tensor floats(const Tensor& like, int64_t count);

}  // namespace flash_ext
