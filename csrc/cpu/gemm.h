// The matrix products: c (+)= a b with a in rows (or transposed) and b in panels.
//
// An operand consists of words. A word is one number, or, for bfloat16 dot products, two that are
// neighbours along the summed dimension. b is cut into panels of kPanel columns, each stored as
// [depth][kPanel] words, so that the inner loop reads it as a stream.
#pragma once
#include <cstdint>

namespace flash_ext::cpu::FX_ISA {

// Products of float with float and double with double; 16-bit inputs are widened when they are packed.
template <typename S>
struct PlainMath {
  using Acc = S;
  using Word = S;
  static constexpr int kWordElements = 1;

  using Words = Vec<S>;
  static Words load(const Word* p) { return Vec<S>::load(p); }
  static Words as_words(Vec<S> x) { return x; }
  static Vec<S> broadcast(Word x) { return Vec<S>::all(x); }
  static Vec<S> mac(Vec<S> acc, Vec<S> a, Vec<S> b) { return fma(a, b, acc); }
  static void store_operand(Word* to, const Vec<S> (&x)[1]) { x[0].store(to); }
};

template <typename Math>
inline constexpr int kLanes = Vec<typename Math::Acc>::kLanes;
template <typename Math>
inline constexpr int kPanel = kMaxVectors * kLanes<Math>;

template <typename Math, int kRows, int kVectors, bool kTransposedA>
inline void multiply_tile(int64_t depth, const typename Math::Word* a, int64_t lda,
                          const typename Math::Word* b, typename Math::Acc* c, int64_t ldc,
                          bool accumulate) {
  using V = Vec<typename Math::Acc>;
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      acc[i][j] = accumulate ? V::load(c + i * ldc + j * V::kLanes) : V::zero();
  for (int64_t k = 0; k < depth; ++k) {
    typename Math::Words columns[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j)
      columns[j] = Math::load(b + k * kPanel<Math> + j * V::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const auto row = Math::broadcast(kTransposedA ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) acc[i][j] = Math::mac(acc[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[i][j].store(c + i * ldc + j * V::kLanes);
}

template <typename Math, int kVectors, bool kTransposedA>
inline void multiply_columns(int rows, int64_t depth, const typename Math::Word* a, int64_t lda,
                             const typename Math::Word* b, typename Math::Acc* c, int64_t ldc,
                             bool accumulate) {
  int i = 0;
  const auto tile = [&]<int kRows>() {
    for (; i + kRows <= rows; i += kRows)
      multiply_tile<Math, kRows, kVectors, kTransposedA>(depth, a + i * (kTransposedA ? 1 : lda),
                                                         lda, b, c + i * ldc, ldc, accumulate);
  };
  tile.template operator()<kMaxRows>();
  if constexpr (kMaxRows > 4) tile.template operator()<4>();
  tile.template operator()<2>();
  tile.template operator()<1>();
}

// c[rows, columns] (+)= a[rows, depth] · one panel of b. Whole vectors of c are written: its rows must
// have room for columns rounded up to kLanes. lda counts words from row to row of a, or, when
// transposed, from one step of the depth to the next.
template <typename Math, bool kTransposedA = false>
inline void multiply_panel(int rows, int columns, int64_t depth, const typename Math::Word* a,
                           int64_t lda, const typename Math::Word* b, typename Math::Acc* c,
                           int64_t ldc, bool accumulate) {
  int left = (columns + kLanes<Math> - 1) / kLanes<Math>;
  const auto part = [&]<int kVectors>() {
    for (; left >= kVectors; left -= kVectors) {
      multiply_columns<Math, kVectors, kTransposedA>(rows, depth, a, lda, b, c, ldc, accumulate);
      b += kVectors * kLanes<Math>;
      c += kVectors * kLanes<Math>;
    }
  };
  if constexpr (kMaxVectors >= 4) part.template operator()<4>();
  part.template operator()<2>();
  part.template operator()<1>();
}

// The whole product, panel by panel; b's panels are [columns / kPanel][panel_depth][kPanel].
template <typename Math, bool kTransposedA = false>
inline void multiply(int rows, int columns, int64_t depth, const typename Math::Word* a,
                     int64_t lda, const typename Math::Word* b, int64_t panel_depth,
                     typename Math::Acc* c, int64_t ldc, bool accumulate) {
  for (int j = 0; j < columns; j += kPanel<Math>)
    multiply_panel<Math, kTransposedA>(rows, std::min(columns - j, kPanel<Math>), depth, a, lda,
                                       b + j * panel_depth, c + j, ldc, accumulate);
}

}  // namespace flash_ext::cpu::FX_ISA
