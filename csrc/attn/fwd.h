// The GPU forward as its callers see it.
#pragma once
#include "fwd_args.h"
#include "fwd_variants.h"
#include "gpu_facts.h"

namespace flash_ext {

using FwdLauncher = void (*)(const FwdArgs&, const GpuFacts&, void* stream);
// In fwd_hd<head_dim>_<dtype>.cu.
template <DType kDType, int kHeadDim>
FwdLauncher find_fwd(FwdVariant want);

struct FwdPlan {
  FwdVariant variant;
  FwdArgs args;
  int64_t scratch_floats() const;
  void use_scratch(float* scratch);
};

// How to compute it: a pure function of the sizes and options.
FwdPlan plan_fwd(const AttnParams& params, const GpuFacts& gpu);

// Starts it on a stream of the current device.
void launch_fwd(const FwdPlan& plan, const GpuFacts& gpu, void* stream);
void launch_combine(const FwdPlan& plan, const GpuFacts& gpu, void* stream);

}  // namespace flash_ext
