// The GPU backward as its callers see it.
#pragma once
#include "bwd_sums.h"
#include "bwd_variants.h"

namespace flash_ext {

using BwdLauncher = void (*)(const BwdArgs&, const GpuFacts&, void* stream);
// In bwd_hd<head_dim>_<dtype>.cu.
template <DType kDType, int kHeadDim>
BwdLauncher find_bwd(BwdVariant want);

struct BwdPlan : BwdSums {
  BwdVariant variant;
};

// How to compute it: a pure function of the sizes and options. With `deterministic`, results repeat
// bit for bit; only the gradient of a mask that is broadcast cannot, which is refused.
BwdPlan plan_bwd(const AttnBwdParams& params, const GpuFacts& gpu, bool deterministic);

// Starts it on a stream of the current device.
void launch_bwd(const BwdPlan& plan, const GpuFacts& gpu, void* stream);

}  // namespace flash_ext
