// Vectors of 16 bytes in the compiler's own vector extension: the baseline of x86-64 and aarch64.
// Same names and types as avx512.h and avx2.h.
#pragma once
#include <cmath>
#include <cstdint>

#include "../element.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kMaxRows = 4;     // rows of a register tile of the matrix product
inline constexpr int kMaxVectors = 2;  // its width: 4 x 2 accumulators of the 16 registers

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16_t x) { return to_float(x); }
inline float widen(half_t x) { return to_float(x); }
inline void narrow(float* to, float x) { *to = x; }
inline void narrow(double* to, double x) { *to = x; }
inline void narrow(bf16_t* to, float x) { *to = from_float<bf16_t>(x); }
inline void narrow(half_t* to, float x) { *to = from_float<half_t>(x); }

template <typename Scalar>
struct Vec {
  static constexpr int kLanes = 16 / sizeof(Scalar);
  typedef Scalar Lanes __attribute__((vector_size(16)));
  typedef decltype(Lanes{} < Lanes{}) Mask;  // integers: 0 or -1
  Lanes v;

  static Vec zero() { return {Lanes{}}; }
  static Vec all(Scalar x) { return {x - Lanes{}}; }
  template <typename T>
  static Vec load(const T* p) {
    return load(p, kLanes);
  }
  // The first n lanes; the others are 0 and their memory is not touched.
  template <typename T>
  static Vec load(const T* p, int n) {
    Lanes x{};
    for (int i = 0; i < kLanes; ++i)
      if (i < n) x[i] = widen(p[i]);
    return {x};
  }
  template <typename T>
  void store(T* p, int n = kLanes) const {
    for (int i = 0; i < kLanes; ++i)
      if (i < n) narrow(p + i, v[i]);
  }

  static Mask first(int n) {
    Mask m{};
    for (int i = 0; i < kLanes; ++i) m[i] = i < n ? -1 : 0;
    return m;
  }
  static Mask first_not(int n) { return ~first(n); }
  static Mask both(Mask a, Mask b) { return a & b; }
};

using F = Vec<float>;
using D = Vec<double>;

template <typename S>
Vec<S> map(Vec<S> x, S (*f)(S)) {
  for (int i = 0; i < Vec<S>::kLanes; ++i) x.v[i] = f(x.v[i]);
  return x;
}

template <typename S>
Vec<S> operator+(Vec<S> a, Vec<S> b) {
  return {a.v + b.v};
}
template <typename S>
Vec<S> operator-(Vec<S> a, Vec<S> b) {
  return {a.v - b.v};
}
template <typename S>
Vec<S> operator*(Vec<S> a, Vec<S> b) {
  return {a.v * b.v};
}
template <typename S>
Vec<S> operator/(Vec<S> a, Vec<S> b) {
  return {a.v / b.v};
}
template <typename S>
Vec<S> fma(Vec<S> a, Vec<S> b, Vec<S> c) {
  return {a.v * b.v + c.v};
}
template <typename S>
Vec<S> fms(Vec<S> a, Vec<S> b, Vec<S> c) {
  return {a.v * b.v - c.v};
}
template <typename S>
Vec<S> fnma(Vec<S> a, Vec<S> b, Vec<S> c) {
  return {c.v - a.v * b.v};
}
template <typename S>
Vec<S> max(Vec<S> a, Vec<S> b) {
  return {a.v > b.v ? a.v : b.v};
}  // b where either is NaN
template <typename S>
Vec<S> round(Vec<S> x) {
  return map<S>(x, std::nearbyint);
}
template <typename S>
Vec<S> fraction(Vec<S> y, Vec<S>& exponent) {  // y - floor(y), and floor(y)
  y = max(Vec<S>::all(-2000), y);              // so that -inf - floor(-inf) is no NaN
  exponent = map<S>(y, std::floor);
  return y - exponent;
}
template <typename S>
Vec<S> select(typename Vec<S>::Mask m, Vec<S> a, Vec<S> b) {
  return {m ? a.v : b.v};
}
template <typename S>
Vec<S> abs(Vec<S> x) {
  return map<S>(x, std::fabs);
}
template <typename S>
typename Vec<S>::Mask less(Vec<S> a, Vec<S> b) {
  return a.v < b.v;
}
template <typename S>
typename Vec<S>::Mask equal(Vec<S> a, Vec<S> b) {
  return a.v == b.v;
}
template <typename S>
Vec<S> scale_by_exp2(Vec<S> x, Vec<S> n) {
  for (int i = 0; i < Vec<S>::kLanes; ++i)
    x.v[i] = n.v[i] < S(-1021) || n.v[i] != n.v[i] ? x.v[i] * 0 : std::ldexp(x.v[i], int(n.v[i]));
  return x;
}
template <typename S>
S reduce_add(Vec<S> x) {
  S sum = 0;
  for (int i = 0; i < Vec<S>::kLanes; ++i) sum += x.v[i];
  return sum;
}
template <typename S>
S reduce_max(Vec<S> x) {
  S top = x.v[0];
  for (int i = 1; i < Vec<S>::kLanes; ++i) top = x.v[i] > top ? x.v[i] : top;
  return top;
}

// Lane i is the sum of x[i].
template <typename S, int kCount>
Vec<S> reduce_add_each(const Vec<S> (&x)[kCount]) {
  Vec<S> sums;
  for (int i = 0; i < kCount; ++i) sums.v[i] = reduce_add(x[i]);
  return sums;
}

// to[c * to_stride + r] = lane c of rows[r]
template <typename S, int kRows>
void store_transposed(const Vec<S> (&rows)[kRows], S* to, int64_t to_stride) {
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < Vec<S>::kLanes; ++c) to[c * to_stride + r] = rows[r].v[c];
}

}  // namespace flash_ext::cpu::FX_ISA
