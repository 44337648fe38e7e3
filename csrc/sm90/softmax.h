// Softmax over keys that arrive in blocks, as attn/online_softmax.h has it, in the order that suits
// products which run meanwhile.
#pragma once
#include "../attn/online_softmax.h"

namespace flash_ext::sm90 {

// What attn/online_softmax.h does, but a reference that is too low is noticed afterwards: where the
// weights turn out large, which is rare, the maximum is looked for and the weights are computed again.
// So nothing waits for the maximum.
template <typename T>
class Softmax {
 public:
  RowVec<T, 16> reference, sum;  // sum: of this lane's elements

  FX_DEVICE Softmax() { reference.fill(kLowest), sum.fill(0.f); }

  // Turns s * scale, scores to base 2, into weights, and rescales what o has gathered so far. kFirst:
  // there is no reference yet. drop(atom, its number) sets weights to zero that are summed all the same.
  template <bool kFirst, int kCols, int kHeadDim, typename Drop>
  FX_DEVICE void step(AccTile<T, 16, kCols>& s, OperandTile<T, 16, kCols>& weights,
                      AccTile<T, 16, kHeadDim>& o, float scale, Drop drop) {
    // Of a lane's part of a block: no weight is beyond float16's largest, and the largest ones are not
    // among its smallest.
    constexpr float kMost = 1024.f, kLeast = 0.125f;
    // The first reference is the first block's maximum; where a maximum is much of the work, 0 if that
    // will do. (With the maximum the largest weight is 1, which is not rounded.)
    constexpr bool kGuess = kFirst && kHeadDim <= 32;
    if constexpr (kGuess) reference.fill(0.f);
    RowVec<T, 16> part;
    bool off = kFirst && !kGuess;
    if constexpr (!kFirst || kGuess) {
      part = weigh(s, weights, scale, drop);
      part.for_each([&](float& x, int, int) {
        off |= !(x <= kMost);  // also where x is NaN
        if constexpr (kGuess) off |= x < kLeast;
      });
    }
    if ((kFirst && !kGuess) || any_lane(off)) {
      if constexpr (kGuess) reference.fill(kLowest);
      const RowVec<T, 16> decay = renew(s, scale);
      if constexpr (!kFirst) multiply(o, decay);
      part = weigh(s, weights, scale, drop);
    }
    sum.for_each([&](float& x, int m, int r) { x += part.v[m][r]; });
  }

  template <int kHeadDim>
  FX_DEVICE static void multiply(AccTile<T, 16, kHeadDim>& o, const RowVec<T, 16>& factor) {
    o.for_each([&](float& x, int m, int r, int) { x *= factor.v[m][r]; });
  }

 private:
  static constexpr float kLowest = -3.402823466e38f;

  // Raises the reference to the scores' maximum. What came before is to be multiplied by the result.
  template <int kCols>
  FX_DEVICE RowVec<T, 16> renew(AccTile<T, 16, kCols>& s, float scale) {
    RowVec<T, 16> top, decay;
    top.fill(-INFINITY);
    s.for_each([&](float& x, int m, int r, int) { top.v[m][r] = fmaxf(top.v[m][r], x); });
    top.reduce_lanes([](float a, float b) { return fmaxf(a, b); });
    reference.for_each([&](float& old, int m, int r) {
      const float now = fmaxf(old, top.v[m][r] * scale);
      decay.v[m][r] = fast_exp2(old - now);
      sum.v[m][r] *= decay.v[m][r];
      old = now;
    });
    return decay;
  }

  // Returns the sums of this lane's weights.
  template <int kCols, typename Drop>
  FX_DEVICE RowVec<T, 16> weigh(const AccTile<T, 16, kCols>& s, OperandTile<T, 16, kCols>& weights,
                                float scale, Drop drop) const {
    RowVec<T, 16> part[2];  // two chains of additions, which do not wait for each other
    part[0].fill(0.f), part[1].fill(0.f);
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      typename MmaAtom<T>::Acc w;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int r = MmaAtom<T>::row_slot(i);
        w.reg[i] = fast_exp2(fmaf(s.atom[0][n].reg[i], scale, -reference.v[0][r]));
        part[i % 2].v[0][r] += w.reg[i];
      }
      drop(w, n);
      weights.atom[0][n] = MmaAtom<T>::to_operand(w);
    }
    part[0].for_each([&](float& x, int m, int r) { x += part[1].v[m][r]; });
    return part[0];
  }
};

}  // namespace flash_ext::sm90
