// What the backwards of csrc/attn and csrc/sm90 have in common: the sums of dq, and all but the main
// kernel.
#pragma once
#include "bwd_args.h"
#include "gpu_facts.h"

namespace flash_ext {

// Arguments, and the memory that they need.
struct BwdSums {
  BwdArgs args;
  bool takes_turns = false;
  int64_t dq_floats() const, turns() const, scratch_floats() const;
  void use_scratch(float* scratch);
};

// As many groups as fit half of the L2 cache with q, grad_o and dq, and as many as fill the device,
// which has `slots` for thread blocks: one after the other, the last would leave a part of it idle.
int groups_at_once(const BwdArgs& args, const GpuFacts& gpu, int64_t slots);

// Raises an error where results cannot repeat bit for bit.
void check_deterministic(const AttnBwdParams& params, bool deterministic);

// The parts before and after the main kernel, in bwd_rows.cu. The first one zeroes the turns, too.
void launch_bwd_start(const BwdSums& sums, void* stream);
void launch_bwd_dsinks(const BwdArgs& args, void* stream);
void launch_bwd_finish(const BwdArgs& args, void* stream);

}  // namespace flash_ext
