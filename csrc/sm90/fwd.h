// The Hopper forward as its callers see it.
#pragma once
#include "../attn/fwd_args.h"
#include "../attn/gpu_facts.h"

namespace flash_ext::sm90 {

struct FwdPlan {
  flash_ext::FwdArgs args;
  int64_t rows_q, rows_kv;  // of the tensors: of a sequence, or of all packed ones
  int64_t blocks;           // thread blocks
  unsigned* taken = nullptr;
};

}  // namespace flash_ext::sm90
