#pragma once
#include "../tile/reg_tile.h"

namespace flash_ext {

inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Softmax over keys that arrive in blocks. Scores are to base 2: exp2 of them is the weight.
//
// What is summed so far is relative to `reference`, which follows the row's maximum, but only when
// that has grown by more than kSlack: until then weights may be as large as 2^kSlack, which costs
// no accuracy, and the output need not be rescaled.
template <typename T, int kRows>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.f, kMostWeight = 256.f;  // 2^kSlack
  static constexpr float kLowest = -3.402823466e38f;
  RowVec<T, kRows> reference, sum;  // sum: of this lane's elements

  // A row that has seen nothing has the lowest reference: weights of -inf are zero there, too.
  FX_DEVICE OnlineSoftmax() { reference.fill(kLowest), sum.fill(0.f); }

  // Lets the reference follow s * scale, the next scores, and rescales what has been gathered.
  template <int kCols, int kHeadDim>
  FX_DEVICE void follow(AccTile<T, kRows, kCols>& s, AccTile<T, kRows, kHeadDim>& o, float scale) {
    RowVec<T, kRows> top = lane_top(s);
    bool grown = false;
    top.for_each([&](float& x, int m, int r) {
      grown |= fmaf(x, scale, -reference.v[m][r]) > kSlack;
    });
    if (!any_lane(grown)) return;
    top.reduce_lanes([](float a, float b) { return fmaxf(a, b); });
    raise(top, o, scale);
  }

  // Raises the reference to top * scale where that is higher.
  template <int kHeadDim>
  FX_DEVICE void raise(RowVec<T, kRows>& top, AccTile<T, kRows, kHeadDim>& o, float scale) {
    RowVec<T, kRows> decay;
    reference.for_each([&](float& old, int m, int r) {
      const float now = fmaxf(old, top.v[m][r] * scale);
      decay.v[m][r] = fast_exp2(old - now);
      sum.v[m][r] *= decay.v[m][r];
      old = now;
    });
    o.for_each([&](float& x, int m, int r, int) { x *= decay.v[m][r]; });
  }

  // The maximum of this lane's elements.
  template <int kCols>
  FX_DEVICE static RowVec<T, kRows> lane_top(AccTile<T, kRows, kCols>& s) {
    RowVec<T, kRows> top;
    top.fill(-INFINITY);
    s.for_each([&](float& x, int m, int r, int) { top.v[m][r] = fmaxf(top.v[m][r], x); });
    return top;
  }

  // Turns s * scale, the scores, into weights in place.
  template <int kCols>
  FX_DEVICE void weigh(AccTile<T, kRows, kCols>& s, float scale) {
    s.for_each([&](float& x, int m, int r, int) {
      x = fast_exp2(fmaf(x, scale, -reference.v[m][r]));
      sum.v[m][r] += x;
    });
  }
};

}  // namespace flash_ext
