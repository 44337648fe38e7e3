#include "kernels.h"

#include <cmath>
#include <vector>

#include "attn/bwd.h"
#include "attn/fwd.h"
#include "simt.h"

using namespace flash_ext;

namespace {

#if defined(FX_EMULATE_SM90)
constexpr bool kAddsAsync = true;
#else
constexpr bool kAddsAsync = false;
#endif

GpuFacts facts(int multiprocessors) {
  return {multiprocessors, simt::kWave, static_cast<int>(simt::kMostShared),
          4 << 20,         kAddsAsync,  false};
}

int attn_fwd(const AttnParams& params, int multiprocessors) {
  const GpuFacts gpu = facts(multiprocessors);
  FwdPlan plan = plan_fwd(params, gpu);
  std::vector<float> scratch(plan.scratch_floats(), NAN);
  plan.use_scratch(scratch.data());
  launch_fwd(plan, gpu, nullptr);
  return plan.args.splits;
}

void attn_bwd(const AttnBwdParams& params, int multiprocessors, bool deterministic) {
  const GpuFacts gpu = facts(multiprocessors);
  BwdPlan plan = plan_bwd(params, gpu, deterministic);
  std::vector<float> scratch(plan.scratch_floats(), NAN);
  plan.use_scratch(scratch.data());
  simt::blocks_in_order = deterministic;
  launch_bwd(plan, gpu, nullptr);
  simt::blocks_in_order = false;
}

}  // namespace

simt::Kernels emulated_kernels() {
  return {[](uint64_t order) { simt::order = order; }, attn_fwd, attn_bwd};
}
