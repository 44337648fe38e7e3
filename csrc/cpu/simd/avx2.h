// Vectors of AVX2 with FMA and F16C. Same names and types as avx512.h and generic.h.
#pragma once
#include <immintrin.h>

#include <cstring>

#include "../element.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kMaxRows = 6;     // rows of a register tile of the matrix product
inline constexpr int kMaxVectors = 2;  // its width: 6 x 2 accumulators of the 16 registers

template <typename T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  using Mask = __m256;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec all(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
  }
  static Vec load(const half_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  // The first n lanes; the others are 0 and their memory is not touched.
  template <typename T>
  static Vec load(const T* p, int n) {
    if (n >= kLanes) return load(p);
    T lanes[kLanes] = {};
    if (n > 0) std::memcpy(lanes, p, n * sizeof(T));
    return load(lanes);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const {
    store_first(p, n, [this](float* to) { store(to); });
  }
  void store(bf16_t* p, int n) const {
    store_first(p, n, [this](bf16_t* to) { _mm_storeu_si128((__m128i*)to, to_bf16()); });
  }
  void store(half_t* p, int n) const {
    store_first(p, n, [this](half_t* to) {
      _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
    });
  }

  static Mask first(int n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  }
  static Mask first_not(int n) {
    return _mm256_xor_ps(first(n), _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
  }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }

  __m128i to_bf16() const {  // round to nearest even; a NaN stays one
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }

 private:
  template <typename T, typename Store>
  static void store_first(T* p, int n, Store store_all) {
    if (n >= kLanes) return store_all(p);
    T lanes[kLanes];
    store_all(lanes);
    if (n > 0) std::memcpy(p, lanes, n * sizeof(T));
  }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  using Mask = __m256d;
  __m256d v;

  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec all(double x) { return {_mm256_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load(const double* p, int n) {
    return {_mm256_maskload_pd(p, _mm256_castpd_si256(first(n)))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm256_maskstore_pd(p, _mm256_castpd_si256(first(n)), v); }

  static Mask first(int n) {
    const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), lane));
  }
  static Mask first_not(int n) {
    return _mm256_xor_pd(first(n), _mm256_castsi256_pd(_mm256_set1_epi64x(-1)));
  }
  static Mask both(Mask a, Mask b) { return _mm256_and_pd(a, b); }
};

using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline F fms(F a, F b, F c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
inline F fnma(F a, F b, F c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }                // b where either is NaN
inline F round(F x) {
  return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F fraction(F y, F& exponent) {  // y - floor(y), and floor(y)
  y = max(F::all(-2000), y);           // so that -inf - floor(-inf) is no NaN
  exponent = {_mm256_round_ps(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return y - exponent;
}
inline F select(F::Mask m, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
inline F abs(F x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
inline F::Mask less(F a, F b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline F::Mask equal(F a, F b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
// x 2^n for x in [0.5, 2] and integral n up to 126; 0 below -125.
inline F scale_by_exp2(F x, F n) {
  const __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const F scaled = {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), shift))};
  const F kept = {_mm256_andnot_ps(less(n, F::all(-125.0f)), scaled.v)};
  return select(equal(x, x), kept, x);
}
inline float reduce_add(F x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(F x) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline D operator+(D a, D b) { return {_mm256_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm256_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm256_mul_pd(a.v, b.v)}; }
inline D operator/(D a, D b) { return {_mm256_div_pd(a.v, b.v)}; }
inline D fma(D a, D b, D c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
inline D fms(D a, D b, D c) { return {_mm256_fmsub_pd(a.v, b.v, c.v)}; }
inline D fnma(D a, D b, D c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
inline D max(D a, D b) { return {_mm256_max_pd(a.v, b.v)}; }
inline D round(D x) {
  return {_mm256_round_pd(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline D fraction(D y, D& exponent) {  // y - floor(y), and floor(y)
  y = max(D::all(-2000), y);           // so that -inf - floor(-inf) is no NaN
  exponent = {_mm256_round_pd(y.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return y - exponent;
}
inline D select(D::Mask m, D a, D b) { return {_mm256_blendv_pd(b.v, a.v, m)}; }
inline D abs(D x) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v)}; }
inline D::Mask less(D a, D b) { return _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ); }
inline D::Mask equal(D a, D b) { return _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ); }
inline D scale_by_exp2(D x, D n) {
  const __m256i shift = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v)), 52);
  const D scaled = {_mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x.v), shift))};
  const D kept = {_mm256_andnot_pd(less(n, D::all(-1021.0)), scaled.v)};
  return select(equal(x, x), kept, x);
}
inline double reduce_add(D x) {
  const __m128d s = _mm_add_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
}
inline double reduce_max(D x) {
  const __m128d s = _mm_max_pd(_mm256_castpd256_pd128(x.v), _mm256_extractf128_pd(x.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(s, _mm_unpackhi_pd(s, s)));
}

// Lane i is the sum of x[i].
inline F reduce_add_each(const F (&x)[8]) {
  __m256 a[4], b[2];
  for (int i = 0; i < 4; ++i)  // sums of x[2i] and x[2i + 1] alternate
    a[i] = _mm256_add_ps(_mm256_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                         _mm256_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
  for (int i = 0; i < 2; ++i) {  // each 128-bit lane: one partial sum of each of four
    const __m256d p = _mm256_castps_pd(a[2 * i]), q = _mm256_castps_pd(a[2 * i + 1]);
    b[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)),
                         _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
  }
  return {_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                        _mm256_permute2f128_ps(b[0], b[1], 0x31))};
}
inline D reduce_add_each(const D (&x)[4]) {
  return {_mm256_setr_pd(reduce_add(x[0]), reduce_add(x[1]), reduce_add(x[2]), reduce_add(x[3]))};
}

// to[c * to_stride + r] = lane c of rows[r]
inline void store_transposed(const F (&rows)[8], float* to, int64_t to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 4; ++i) {  // pairs of rows, then of pairs, within 128-bit lanes
    a[2 * i] = _mm256_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i) {
    const __m256d x0 = _mm256_castps_pd(a[4 * i]), x1 = _mm256_castps_pd(a[4 * i + 1]);
    const __m256d x2 = _mm256_castps_pd(a[4 * i + 2]), x3 = _mm256_castps_pd(a[4 * i + 3]);
    b[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(x0, x2));
    b[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x0, x2));
    b[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(x1, x3));
    b[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(x1, x3));
  }
  for (int i = 0; i < 4; ++i) {  // then the 128-bit lanes themselves
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

inline void store_transposed(const D (&rows)[4], double* to, int64_t to_stride) {
  for (int r = 0; r < 4; ++r) {
    alignas(32) double lanes[4];
    rows[r].store(lanes);
    for (int c = 0; c < 4; ++c) to[c * to_stride + r] = lanes[c];
  }
}

}  // namespace flash_ext::cpu::FX_ISA
