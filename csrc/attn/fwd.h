// The GPU forward as its callers see it.
#pragma once
#include "fwd_args.h"
#include "fwd_variants.h"

namespace flash_ext {

struct GpuFacts {
  int multiprocessors, warp_size, smem_per_block, l2_bytes;
};
GpuFacts gpu_facts(int device);

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

// Makes a device current for this library's runtime while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  int previous;
};

}  // namespace flash_ext
