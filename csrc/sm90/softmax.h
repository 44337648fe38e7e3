// attn/online_softmax.h cut in two: what needs the scores, and what needs the output, which is
// still being computed meanwhile.
#pragma once
#include "../attn/online_softmax.h"

namespace flash_ext::sm90 {

template <typename T>
struct Softmax {
  static constexpr float kSlack = 8.f, kLowest = -3.402823466e38f;
  RowVec<T, 16> reference, sum, decay;  // sum: of this lane's elements

  FX_DEVICE Softmax() { reference.fill(kLowest), sum.fill(0.f); }

  // Turns s * scale, scores to base 2, into weights in place. Returns whether the output must be
  // rescaled, which is the same in all lanes of the warp.
  template <int kCols>
  FX_DEVICE bool weigh(AccTile<T, 16, kCols>& s, float scale) {
    RowVec<T, 16> top;  // of this lane's elements
    top.fill(-INFINITY);
    s.for_each([&](float& x, int m, int r, int) { top.v[m][r] = fmaxf(top.v[m][r], x); });
    bool grown = false;
    top.for_each(
        [&](float& x, int m, int r) { grown |= fmaf(x, scale, -reference.v[m][r]) > kSlack; });
    grown = any_lane(grown);
    if (grown) {
      top.reduce_lanes([](float a, float b) { return fmaxf(a, b); });
      reference.for_each([&](float& old, int m, int r) {
        const float now = fmaxf(old, top.v[m][r] * scale);
        decay.v[m][r] = fast_exp2(old - now);
        sum.v[m][r] *= decay.v[m][r];
        old = now;
      });
    }
    s.for_each([&](float& x, int m, int r, int) {
      x = fast_exp2(fmaf(x, scale, -reference.v[m][r]));
      sum.v[m][r] += x;
    });
    return grown;
  }

  template <int kCols>
  FX_DEVICE void rescale(AccTile<T, 16, kCols>& o) const {
    o.for_each([&](float& x, int m, int r, int) { x *= decay.v[m][r]; });
  }
};

}  // namespace flash_ext::sm90
