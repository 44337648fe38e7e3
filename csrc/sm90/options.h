// What a Hopper kernel can do beyond band masks and sinks, where it is asked to.
#pragma once
#include "../attn/params.h"

namespace flash_ext::sm90 {

enum class Options {
  none,
  scores,   // softcap, ALiBi, mask tensors
  dropout,  // and dropout
};

constexpr Options needed_options(const AttnParams& p) {
  if (p.dropout_threshold) return Options::dropout;
  return p.mask.data || p.softcap > 0 || p.alibi_slopes ? Options::scores : Options::none;
}

}  // namespace flash_ext::sm90
