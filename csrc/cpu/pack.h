// From rows in memory to the operands of gemm.h. Everything beyond the given rows and columns is
// filled with zeros, so that a tail costs no special case, and no NaN, in the products.
#pragma once
#include <cstdint>

namespace flash_ext::cpu::FX_ISA {

template <typename Math>
constexpr int64_t words(int64_t elements) {
  return (elements + Math::kWordElements - 1) / Math::kWordElements;
}
constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <typename T>
inline void prefetch(const T* row, int columns) {
  for (int i = 0; i < columns * int(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
}
template <typename T>
inline void prefetch_for_write(const T* row, int columns) {
  for (int i = 0; i < columns * int(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + i, 1);
}
// What lies 4 KB further on: streams of short rows do not get it from the hardware prefetchers in time.
template <typename T>
inline void prefetch_ahead(const T* row, int columns) {
  prefetch(row + 4096 / sizeof(T), columns);
}

// kLanes words from the row x of n elements: lane i holds the elements of word i.
template <typename Math, typename T>
inline Vec<typename Math::Acc> load_words(const T* x, int n) {
  if constexpr (Math::kWordElements == 2) return Math::load_words(x, n);
  else if (n >= kLanes<Math>) return Vec<typename Math::Acc>::load(x);
  else return Vec<typename Math::Acc>::load(x, n);
}

// Operand a: to[row][word], rows ld words apart, ld at least words(columns) rounded up to kLanes.
template <typename Math, typename T>
inline void pack_row(const T* x, int64_t columns, typename Math::Word* to) {
  constexpr int kStep = kLanes<Math> * Math::kWordElements;
  for (int64_t j = 0; j < columns; j += kStep)
    load_words<Math>(x + j, int(std::min<int64_t>(columns - j, kStep)))
        .store((typename Math::Acc*)to + j / Math::kWordElements);
}

// Operand b = x: to[columns / kPanel][words(rows)][kPanel]. row(r) is the address of row r of x.
template <typename Math, typename RowOf>
inline void pack_panels(RowOf row, int rows, int columns, typename Math::Word* to) {
  using V = Vec<typename Math::Acc>;
  const int64_t depth = words<Math>(rows);
  for (int64_t k = 0; k < depth; ++k) {
    const auto* x = row(k * Math::kWordElements);
    [[maybe_unused]] const auto* next = 2 * k + 1 < rows ? row(2 * k + 1) : nullptr;
    prefetch_ahead(x, columns * Math::kWordElements);
    for (int j = 0; j < columns; j += V::kLanes) {
      auto* at = to + (j / kPanel<Math> * depth + k) * kPanel<Math> + j % kPanel<Math>;
      const int n = std::min(columns - j, V::kLanes);
      if constexpr (Math::kWordElements == 2)
        Math::store_interleaved(at, x + j, next ? next + j : nullptr, n);
      else if (n == V::kLanes) V::load(x + j).store(at);
      else V::load(x + j, n).store(at);
    }
  }
}

// Operand b = x transposed: to[rows / kPanel][words(columns)][kPanel].
template <typename Math, typename RowOf>
inline void pack_panels_transposed(RowOf row, int rows, int columns, typename Math::Word* to) {
  using S = typename Math::Acc;
  using V = Vec<S>;
  constexpr int kL = V::kLanes, kStep = kL * Math::kWordElements;
  const int64_t depth = words<Math>(columns);
  for (int r0 = 0; r0 < rows; r0 += kL) {
    for (int r = r0; r < std::min(r0 + kL, rows); ++r) prefetch_ahead(row(r), columns);
    S* panel = (S*)to + r0 / kPanel<Math> * depth * kPanel<Math> + r0 % kPanel<Math>;
    for (int j = 0; j < columns; j += kStep) {
      V block[kL];
      for (int r = 0; r < kL; ++r)
        block[r] = r0 + r < rows ? load_words<Math>(row(r0 + r) + j, std::min(columns - j, kStep))
                                 : V::zero();
      const int64_t k0 = j / Math::kWordElements, count = std::min<int64_t>(depth - k0, kL);
      if (count == kL) {
        store_transposed(block, panel + k0 * kPanel<Math>, kPanel<Math>);
      } else {
        S corner[kL * kL];
        store_transposed(block, corner, kL);
        for (int64_t k = 0; k < count; ++k)
          V::load(corner + k * kL).store(panel + (k0 + k) * kPanel<Math>);
      }
    }
  }
}

}  // namespace flash_ext::cpu::FX_ISA
