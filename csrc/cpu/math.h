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

// 2^r on [-1/2, 1/2]. Float: minimax fits with value 1 at 0, of relative error 2.0e-9 and, for what
// is rounded to 16 bits afterwards, 2.8e-6. Double: the Taylor series, below 1e-17.
inline constexpr float kExp2Float[] = {1.0f,           6.93147203e-01f, 2.40226479e-01f, 5.55033246e-02f,
                                       9.61843745e-03f, 1.33988800e-03f, 1.53533434e-04f};
inline constexpr float kExp2Coarse[] = {1.0f, 6.93124200e-01f, 2.40240990e-01f, 5.59064000e-02f, 9.58279000e-03f};
inline constexpr double kExp2Double[] = {
    1.0,                    0.6931471805599453,    0.2402265069591007,    0.05550410866482158,   0.009618129107628477,
    0.0013333558146428443,  0.0001540353039338161, 1.525273380405984e-05, 1.3215486790144307e-06, 1.01780860092397e-07,
    7.0549116208011236e-09, 4.4455382718708117e-10, 2.5678435993488202e-11, 1.3691488853904128e-12};

// 2^x for x up to 126, 0 for -inf; a NaN stays one.
template <bool kCoarse, typename S>
inline Vec<S> exp2(Vec<S> x) {
  x = max(Vec<S>::all(S(-2000)), x);  // so that -inf - round(-inf) is no NaN
  const Vec<S> n = round(x), r = x - n;
  if constexpr (sizeof(S) == 8) return scale_by_exp2(horner<S>(r, kExp2Double), n);
  else if constexpr (kCoarse) return scale_by_exp2(horner<S>(r, kExp2Coarse), n);
  else return scale_by_exp2(horner<S>(r, kExp2Float), n);
}

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
