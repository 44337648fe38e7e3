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
  static constexpr float kSlack = 8.f, kLowest = -3.402823466e38f;
  RowVec<T, kRows> reference, sum;  // sum: of this lane's elements

  // A row that has seen nothing has the lowest reference: there, too, -inf has the weight 0.
  FX_DEVICE OnlineSoftmax() { reference.fill(kLowest), sum.fill(0.f); }

  // Turns s * scale, the scores, into weights in place, and rescales what o has gathered so far.
  template <int kCols, int kHeadDim>
  FX_DEVICE void step(AccTile<T, kRows, kCols>& s, AccTile<T, kRows, kHeadDim>& o, float scale) {
    RowVec<T, kRows>
        top;  // of this lane's elements: the other lanes' are only asked for when needed
    top.fill(-INFINITY);
    s.for_each([&](float& x, int m, int r, int) { top.v[m][r] = fmaxf(top.v[m][r], x); });
    bool grown = false;
    top.for_each(
        [&](float& x, int m, int r) { grown |= fmaf(x, scale, -reference.v[m][r]) > kSlack; });
    if (any_lane(grown)) {
      top.reduce_lanes([](float a, float b) { return fmaxf(a, b); });
      RowVec<T, kRows> decay;
      reference.for_each([&](float& old, int m, int r) {
        const float now = fmaxf(old, top.v[m][r] * scale);
        decay.v[m][r] = fast_exp2(old - now);
        sum.v[m][r] *= decay.v[m][r];
        old = now;
      });
      o.for_each([&](float& x, int m, int r, int) { x *= decay.v[m][r]; });
    }
    s.for_each([&](float& x, int m, int r, int) {
      x = fast_exp2(fmaf(x, scale, -reference.v[m][r]));
      sum.v[m][r] += x;
    });
  }
};

// A row's denominator, once no more keys come: `sum` of weights relative to 2^top.
struct Denominator {
  float top, sum, factor = 1.f;  // factor: the weights' so far, for the new top

  // The sink, a score to base 2 without a value, takes part.
  FX_DEVICE void add_sink(float sink) {
    const float both = fmaxf(top, sink);
    factor = fast_exp2(top - both);
    sum = sum * factor + fast_exp2(sink - both);
    top = both;
  }
  // By what the output is multiplied.
  FX_DEVICE float reciprocal() const { return sum == 0.f ? 0.f : factor / sum; }
};

}  // namespace flash_ext
