// Which keys a query sees under causal masks and windows (docs/design.md, section 2).
#pragma once
#include <algorithm>
#include <cstdint>

#include "params.h"

namespace flash_ext {

struct KeyRange {
  int64_t begin, end;  // empty where begin >= end
};

// The band mask of one sequence. Both ends of visible(i) grow with i, so a block of queries sees
// from the first one's begin to the last one's end.
struct BandMask {
  int64_t left, right;  // query i sees keys i - left to i + right
  int64_t seq_kv;

  constexpr BandMask(const AttnParams& p, int64_t seq_q, int64_t seq_kv) : seq_kv(seq_kv) {
    const int64_t offset = p.top_left ? 0 : seq_kv - seq_q;
    const int64_t far = seq_q + seq_kv;  // beyond every key, so that sums cannot overflow
    left = (p.window_left < 0 ? far : std::min(p.window_left, far)) - offset;
    right = (p.window_right < 0 ? far : std::min(p.window_right, far)) + offset;
    unbounded_left = p.window_left < 0;
    unbounded_right = p.window_right < 0;
  }

  constexpr KeyRange visible(int64_t i) const {
    return {unbounded_left ? 0 : std::max<int64_t>(i - left, 0),
            unbounded_right ? seq_kv : std::min(i + right + 1, seq_kv)};
  }
  // What any of the queries first to last sees.
  constexpr KeyRange visible(int64_t first, int64_t last) const {
    return {visible(first).begin, visible(last).end};
  }

 private:
  bool unbounded_left, unbounded_right;
};

}  // namespace flash_ext
