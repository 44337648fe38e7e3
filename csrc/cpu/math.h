// Exponential and hyperbolic tangent on vectors.
#pragma once
#include <cstddef>

namespace flash_ext::cpu::FX_ISA {

template <typename S, size_t kTerms>
inline Vec<S> horner(Vec<S> x, const S (&c)[kTerms]) {  // c[0] + c[1] x + ...
  Vec<S> sum = Vec<S>::all(c[kTerms - 1]);
  for (int i = int(kTerms) - 2; i >= 0; --i) sum = fma(sum, x, Vec<S>::all(c[i]));
  return sum;
}

// 2^(r - 1/2) on [0, 1). Float: a minimax fit, within 1.6e-7 as evaluated and exactly 1 in the middle,
// where the largest score of a row is. Double: the Taylor series of 2^t, t = r - 1/2, below 1e-17.
inline constexpr float kExp2Float[] = {7.071067095e-01f, 4.901338518e-01f, 1.698105782e-01f,
                                       3.948048875e-02f, 6.355331279e-03f, 1.326472498e-03f};
inline constexpr double kExp2Double[] = {1.0,
                                         0.6931471805599453,
                                         0.2402265069591007,
                                         0.05550410866482158,
                                         0.009618129107628477,
                                         0.0013333558146428443,
                                         0.0001540353039338161,
                                         1.525273380405984e-05,
                                         1.3215486790144307e-06,
                                         1.01780860092397e-07,
                                         7.0549116208011236e-09,
                                         4.4455382718708117e-10,
                                         2.5678435993488202e-11,
                                         1.3691488853904128e-12};

// 2^(y - 1/2) for y up to 126, 0 for -inf; a NaN stays one. The half belongs to the argument because
// callers have a constant to hide it in; floor(y) then rounds y - 1/2 to the nearest integer.
inline constexpr double kExp2Bias = 0.5;
template <typename S>
inline Vec<S> exp2_biased(Vec<S> y) {
  Vec<S> n;
  const Vec<S> r = fraction(y, n);
  if constexpr (sizeof(S) == 8)
    return scale_by_exp2(horner<S>(r - Vec<S>::all(S(kExp2Bias)), kExp2Double), n);
  else return scale_by_exp2(horner<S>(r, kExp2Float), n);
}

// exp(scale x - shift). With kGeneral scale is 1, and shift is subtracted first, which costs an instruction
// and keeps the largest finite masks from overflowing.
template <typename S, bool kGeneral>
struct ExpOf {
  S multiplier, subtrahend;

  ExpOf(S scale, S shift)
      : multiplier(scale * kLog2e), subtrahend(kGeneral ? shift : shift * kLog2e - S(kExp2Bias)) {}

  Vec<S> operator()(Vec<S> x) const {
    const Vec<S> m = Vec<S>::all(multiplier), s = Vec<S>::all(subtrahend);
    if constexpr (kGeneral) return exp2_biased(fma(x - s, m, Vec<S>::all(S(kExp2Bias))));
    else return exp2_biased(fms(x, m, s));
  }

 private:
  static constexpr S kLog2e = S(1.4426950408889634074);
};

// tanh x = e / (e + 2) with e = exp(2x) - 1, which keeps its relative accuracy near 0.
template <typename S>
inline Vec<S> tanh(Vec<S> x) {
  using V = Vec<S>;
  constexpr int kTerms = sizeof(S) == 8 ? 14 : 8;
  S inverse_factorial[kTerms];  // (exp(r) - 1) / r = 1 + r/2 + r^2/6 + ...
  double factorial = 1;
  for (int i = 0; i < kTerms; ++i) inverse_factorial[i] = S(1 / (factorial *= i + 1));

  V y = abs(x) + abs(x);
  y = select(less(V::all(S(44)), y), V::all(S(44)), y);  // there tanh is 1 in both types
  const V n = round(y * V::all(S(1.4426950408889634)));
  V r = fnma(n, V::all(S(0.693145751953125)), y);  // ln 2 in two parts, the first with short digits
  r = fnma(n, V::all(S(1.4286068203094172e-06)), r);
  const V power = scale_by_exp2(V::all(S(1)), n);
  const V e = fma(power * r, horner<S>(r, inverse_factorial), power - V::all(S(1)));
  const V t = e / (e + V::all(S(2)));
  return select(less(x, V::zero()), V::zero() - t, t);
}

}  // namespace flash_ext::cpu::FX_ISA
