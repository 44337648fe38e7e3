// The Hopper backward as its callers see it.
#pragma once
#include <optional>
#include <string>

#include "../attn/bwd_sums.h"
#include "../attn/seen_keys.h"
#include "bwd_variants.h"

namespace flash_ext::sm90 {

struct BwdPlan : BwdSums {
  int head_dim;  // of kBwdHeadDims
  Options options;
  SeenKeys seen;  // of a bool mask

  int64_t scratch_floats() const;
  void use_scratch(float* scratch);
};

using BwdLauncher = void (*)(const BwdPlan&, void* stream);
// In bwd_hd<head_dim>_<dtype>.cu: the main kernel.
template <DType kDType, int kHeadDim>
void launch_main(const BwdPlan& plan, void* stream);
// The kernels for dk and dv, and for dq, of wide heads.
template <DType kDType, int kHeadDim>
void launch_wide(const BwdPlan& plan, void* stream);

// Why these kernels cannot compute it.
std::optional<std::string> obstacle(const AttnBwdParams& params, const GpuFacts& gpu);
// Whether they are the faster ones.
bool worthwhile(const AttnBwdParams& params);

// How to compute it: a pure function of the sizes and options. With `deterministic`, results repeat
// bit for bit.
BwdPlan plan_bwd(const AttnBwdParams& params, const GpuFacts& gpu, bool deterministic);
// Starts it on a stream of the current device.
void launch_bwd(const BwdPlan& plan, void* stream);

}  // namespace flash_ext::sm90
