// The CPU backend's two entry points: whole calls, cut into tasks and run on torch's threads.
#pragma once
#include "../attn/params.h"

namespace flash_ext::cpu {

void attn_fwd(const AttnParams& p);
void attn_bwd(const AttnBwdParams& p);

}  // namespace flash_ext::cpu
