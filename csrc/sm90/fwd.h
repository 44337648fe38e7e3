// The Hopper forward as its callers see it.
#pragma once
#include <optional>
#include <string>

#include "../attn/fwd_args.h"
#include "../attn/gpu_facts.h"
#include "fwd_variants.h"

namespace flash_ext::sm90 {

struct FwdPlan {
  int head_dim;  // of kFwdHeadDims
  Options options;
  bool even;  // see fwd_tile
  flash_ext::FwdArgs args;
  int64_t thread_blocks = 0;
  bool turns = true;    // of warpgroups at products
  bool counts = false;  // thread blocks take the next tile when they are done with one
  unsigned* taken = nullptr;

  int64_t scratch_floats() const { return 2 * args.seen.count() + counts; }
  void use_scratch(float* scratch) {
    if (args.seen.count()) args.seen.ranges = reinterpret_cast<const SeenRange*>(scratch);
    if (counts) taken = reinterpret_cast<unsigned*>(scratch + 2 * args.seen.count());
  }
};

using FwdLauncher = void (*)(const FwdPlan&, void* stream);
// In fwd_hd<head_dim>_<dtype>.cu.
template <DType kDType, int kHeadDim>
void launch(const FwdPlan& plan, void* stream);

// Why these kernels cannot compute it.
std::optional<std::string> obstacle(const AttnParams& params, const GpuFacts& gpu);
// Whether they are the faster ones.
bool worthwhile(const AttnParams& params);

// How to compute it: a pure function of the sizes and options.
FwdPlan plan_fwd(const AttnParams& params, const GpuFacts& gpu);
// Starts it on a stream of the current device.
void launch_fwd(const FwdPlan& plan, void* stream);

}  // namespace flash_ext::sm90
