// The bfloat16 dot product of AVX512-BF16: a word is a pair of neighbours along the summed dimension.
#pragma once
#include <immintrin.h>

namespace flash_ext::cpu::FX_ISA {

struct Bf16DotMath {
  using Acc = float;
  using Word = uint32_t;
  static constexpr int kWordElements = 2;

  using Words = __m512bh;
  static Words load(const Word* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Words as_words(F x) { return (__m512bh)x.v; }
  static Words broadcast(Word x) { return (__m512bh)_mm512_set1_epi32(int(x)); }
  static F mac(F acc, Words a, Words b) { return {_mm512_dpbf16_ps(acc.v, a, b)}; }

  // 32 neighbours of a row.
  static void store_operand(Word* to, const F (&x)[2]) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(x[1].v, x[0].v));
  }
  // to[i] = the pair (x[0][i], x[1][i]): two rows, neighbours along the summed dimension.
  static void store_interleaved(Word* to, const F (&x)[2]) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[0].v));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x[1].v));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static void store_interleaved(Word* to, const bf16_t* even, const bf16_t* odd, int n) {
    const __mmask16 lanes = F::first(n);
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even));
    const __m512i high =
        odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd)) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  // 2n bfloat16 of a row as words.
  static F load_words(const bf16_t* p, int elements) {
    const __mmask32 lanes = elements >= 32 ? ~0u : elements <= 0 ? 0u : (1u << elements) - 1;
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p))};
  }
};

}  // namespace flash_ext::cpu::FX_ISA
