// Softmax over keys that arrive in blocks, as attn/online_softmax.h has it, in the order that suits
// products which run meanwhile.
#pragma once
#include "../attn/online_softmax.h"

namespace flash_ext::sm90 {

// 2^x for x up to 127 without the special-function unit, which does only 16 a cycle: 2^n times a
// polynomial of degree 3 on [-1/2, 1/2], whose relative error is 7.5e-5, below a 16-bit weight's
// rounding. Very small weights become 2^-125.
FX_DEVICE float polynomial_exp2(float x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer
  x = fmaxf(x, -125.f);
  const float n = x + kRound;
  const float f = x - (n - kRound);
  float y = fmaf(f, 0.05517134f, 0.24261034f);
  y = fmaf(f, y, 0.69326097f);
  y = fmaf(f, y, 0.99992812f);
  return __int_as_float(__float_as_int(y) + (__float_as_int(n) << 23));
}

template <typename T>
struct Softmax {
  static constexpr float kSlack = 8.f, kLowest = -3.402823466e38f;
  // Weights are relative to reference; sum: of this lane's elements; decay: what rescale multiplies.
  RowVec<T, 16> reference, sum, decay;

  FX_DEVICE Softmax() { reference.fill(kLowest), sum.fill(0.f); }

  // Raises the reference to the maximum, whose part in this lane is `top`.
  FX_DEVICE void renew(RowVec<T, 16>& top, float scale) {
    top.reduce_lanes([](float a, float b) { return fmaxf(a, b); });
    reference.for_each([&](float& old, int m, int r) {
      const float now = fmaxf(old, top.v[m][r] * scale);
      decay.v[m][r] = fast_exp2(old - now);
      sum.v[m][r] *= decay.v[m][r];
      old = now;
    });
  }

  template <int kCols>
  FX_DEVICE static RowVec<T, 16> maximum(AccTile<T, 16, kCols>& s) {
    RowVec<T, 16> top, other;  // two chains, which do not wait for each other
    top.fill(-INFINITY), other.fill(-INFINITY);
    s.for_each_pair([&](int j, int m, int r, int) {
      top.v[m][r] = fmaxf(top.v[m][r], s.pair(j)[0]);
      other.v[m][r] = fmaxf(other.v[m][r], s.pair(j)[1]);
    });
    top.for_each([&](float& x, int m, int r) { x = fmaxf(x, other.v[m][r]); });
    return top;
  }

  // Turns s * scale, scores to base 2, into weights in place. Returns whether the output must be
  // rescaled, which is the same in all lanes of the warp.
  template <int kByPolynomial, int kCols>
  FX_DEVICE bool weigh(AccTile<T, 16, kCols>& s, float scale) {
    RowVec<T, 16> top = maximum(s);
    bool grown = false;
    top.for_each(
        [&](float& x, int m, int r) { grown |= fmaf(x, scale, -reference.v[m][r]) > kSlack; });
    grown = any_lane(grown);
    if (grown) renew(top, scale);
    RowVec<T, 16> other;
    other.fill(0.f);
    s.for_each_pair([&](int j, int m, int r, int) {
      float* x = s.pair(j);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float score = fmaf(x[i], scale, -reference.v[m][r]);
        x[i] = j % 8 * 2 + i < kByPolynomial ? polynomial_exp2(score) : fast_exp2(score);
      }
      sum.v[m][r] += x[0];
      other.v[m][r] += x[1];
    });
    sum.for_each([&](float& x, int m, int r) { x += other.v[m][r]; });
    return grown;
  }

  // The same into `weights`, and the output is rescaled, too. The reference is taken to be high
  // enough; only where a sum tells that it was not, the maximum is looked for and all is done again.
  template <int kByPolynomial, int kCols, int kHeadDim>
  FX_DEVICE void weigh_boldly(AccTile<T, 16, kCols>& s, OperandTile<T, 16, kCols>& weights,
                              AccTile<T, 16, kHeadDim>& o, float scale) {
    constexpr float kMost = 1024.f;  // of a lane's part of a block
    RowVec<T, 16> part = weigh_into<kByPolynomial>(s, weights, scale);
    bool low = false;
    part.for_each([&](float& x, int, int) { low |= !(x <= kMost); });
    if (any_lane(low)) {
      RowVec<T, 16> top = maximum(s);
      renew(top, scale);
      rescale(o);
      part = weigh_into<0>(s, weights, scale);
    }
    sum.for_each([&](float& x, int m, int r) { x += part.v[m][r]; });
  }

  template <int kCols>
  FX_DEVICE void rescale(AccTile<T, 16, kCols>& o) const {
    o.for_each([&](float& x, int m, int r, int) { x *= decay.v[m][r]; });
  }

 private:
  template <int kByPolynomial, int kCols>
  FX_DEVICE RowVec<T, 16> weigh_into(AccTile<T, 16, kCols>& s, OperandTile<T, 16, kCols>& weights,
                                     float scale) const {
    RowVec<T, 16> part, other;
    part.fill(0.f), other.fill(0.f);
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      typename MmaAtom<T>::Acc w;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = MmaAtom<T>::row_slot(i);
        const float score = fmaf(s.atom[0][n].reg[i], scale, -reference.v[0][r]);
        w.reg[i] = (n % 2 * 8 + i) < kByPolynomial ? polynomial_exp2(score) : fast_exp2(score);
        (i % 2 ? other : part).v[0][r] += w.reg[i];
      }
      weights.atom[0][n] = MmaAtom<T>::to_operand(w);
    }
    part.for_each([&](float& x, int m, int r) { x += other.v[m][r]; });
    return part;
  }
};

}  // namespace flash_ext::sm90
