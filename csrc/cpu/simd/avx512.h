// Vectors of AVX-512 (F, BW, DQ, VL). Same names and types as avx2.h and generic.h.
#pragma once
#include <immintrin.h>

#include "../element.h"

namespace flash_ext::cpu::FX_ISA {

inline constexpr int kMaxRows = 6;     // rows of a register tile of the matrix product
inline constexpr int kMaxVectors = 4;  // its width: 6 x 4 accumulators of the 32 registers

template <typename T>
struct Vec;

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec all(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16_t* p) { return from_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const half_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
  }
  // The first n lanes; the others are 0 and their memory is not touched.
  static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load(const bf16_t* p, int n) {
    return from_bf16(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static Vec load(const half_t* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bf16_t* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store(half_t* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Mask first(int n) {
    return n >= 16 ? Mask(0xffff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1);
  }
  static Mask first_not(int n) { return Mask(~first(n)); }
  static Mask both(Mask a, Mask b) { return a & b; }

  static Vec from_bf16(__m256i x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
  }
  __m256i to_bf16() const {  // round to nearest even; a NaN stays one
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  using Mask = __mmask8;
  __m512d v;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec all(double x) { return {_mm512_set1_pd(x)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load(const double* p, int n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store(double* p, int n) const { _mm512_mask_storeu_pd(p, first(n), v); }

  static Mask first(int n) { return n >= 8 ? Mask(0xff) : n <= 0 ? Mask(0) : Mask((1u << n) - 1); }
  static Mask first_not(int n) { return Mask(~first(n)); }
  static Mask both(Mask a, Mask b) { return a & b; }
};

using F = Vec<float>;
using D = Vec<double>;

inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }    // a b + c
inline F fms(F a, F b, F c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }    // a b - c
inline F fnma(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }                // b where either is NaN
inline F round(F x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline F scale_by_exp2(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }  // x 2^floor(n)
inline F fraction(F y, F& exponent) {  // y - floor(y); the exponent is y, whose floor counts
  exponent = y;
  return {_mm512_reduce_ps(y.v, _MM_FROUND_TO_NEG_INF)};
}
inline F select(F::Mask m, F a, F b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline F abs(F x) { return {_mm512_abs_ps(x.v)}; }
inline F::Mask less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline F::Mask equal(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline float reduce_add(F x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(F x) { return _mm512_reduce_max_ps(x.v); }

inline D operator+(D a, D b) { return {_mm512_add_pd(a.v, b.v)}; }
inline D operator-(D a, D b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline D operator*(D a, D b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline D operator/(D a, D b) { return {_mm512_div_pd(a.v, b.v)}; }
inline D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline D fms(D a, D b, D c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
inline D fnma(D a, D b, D c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
inline D max(D a, D b) { return {_mm512_max_pd(a.v, b.v)}; }
inline D round(D x) { return {_mm512_roundscale_pd(x.v, _MM_FROUND_TO_NEAREST_INT)}; }
inline D scale_by_exp2(D x, D n) { return {_mm512_scalef_pd(x.v, n.v)}; }
inline D fraction(D y, D& exponent) {  // y - floor(y); the exponent is y, whose floor counts
  exponent = y;
  return {_mm512_reduce_pd(y.v, _MM_FROUND_TO_NEG_INF)};
}
inline D select(D::Mask m, D a, D b) { return {_mm512_mask_blend_pd(m, b.v, a.v)}; }
inline D abs(D x) { return {_mm512_abs_pd(x.v)}; }
inline D::Mask less(D a, D b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ); }
inline D::Mask equal(D a, D b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
inline double reduce_add(D x) { return _mm512_reduce_add_pd(x.v); }
inline double reduce_max(D x) { return _mm512_reduce_max_pd(x.v); }

// Lane i is the sum of x[i].
inline F reduce_add_each(const F (&x)[16]) {
  __m512 a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i)  // sums of x[2i] and x[2i + 1] alternate
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i].v, x[2 * i + 1].v),
                         _mm512_unpackhi_ps(x[2 * i].v, x[2 * i + 1].v));
  for (int i = 0; i < 4; ++i) {  // each 128-bit lane: one partial sum of each of four
    const __m512d p = _mm512_castps_pd(a[2 * i]), q = _mm512_castps_pd(a[2 * i + 1]);
    b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  }
  for (int i = 0; i < 2; ++i)  // lanes 0, 1 of b[2i], then of b[2i + 1], and 2, 3 added to them
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                        _mm512_shuffle_f32x4(c[0], c[1], 0xdd))};
}

inline D reduce_add_each(const D (&x)[8]) {
  alignas(64) double sums[8];
  for (int i = 0; i < 8; ++i) sums[i] = reduce_add(x[i]);
  return D::load(sums);
}

// to[c * to_stride + r] = lane c of rows[r]
inline void store_transposed(const F (&rows)[16], float* to, int64_t to_stride) {
  __m512 a[16], b[16];
  for (int i = 0; i < 8; ++i) {  // pairs of rows, then of pairs, within 128-bit lanes
    a[2 * i] = _mm512_unpacklo_ps(rows[2 * i].v, rows[2 * i + 1].v);
    a[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i].v, rows[2 * i + 1].v);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d x0 = _mm512_castps_pd(a[4 * i]), x1 = _mm512_castps_pd(a[4 * i + 1]);
    const __m512d x2 = _mm512_castps_pd(a[4 * i + 2]), x3 = _mm512_castps_pd(a[4 * i + 3]);
    b[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x0, x2));
    b[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x0, x2));
    b[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(x1, x3));
    b[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(x1, x3));
  }
  for (int i = 0; i < 4; ++i) {  // then the 128-bit lanes themselves
    a[i] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(to + (i)*to_stride, _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_ps(to + (i + 8) * to_stride, _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd));
    _mm512_storeu_ps(to + (i + 4) * to_stride, _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88));
    _mm512_storeu_ps(to + (i + 12) * to_stride, _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd));
  }
}

inline void store_transposed(const D (&rows)[8], double* to, int64_t to_stride) {
  for (int r = 0; r < 8; ++r) {
    alignas(64) double lanes[8];
    rows[r].store(lanes);
    for (int c = 0; c < 8; ++c) to[c * to_stride + r] = lanes[c];
  }
}

}  // namespace flash_ext::cpu::FX_ISA
