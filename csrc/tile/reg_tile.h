// Register tiles: a [kRows, kCols] float32 accumulator spread over a warp, and what attention does
// to it. No vendor names below: every layout question is put to MmaAtom.
#pragma once
#include "mma_atom.h"
#include "shared_tile.h"

namespace flash_ext {

inline constexpr int kAtom = 16;  // MmaAtom is 16x16x16 on every target

// One value a row of the tile this lane touches.
template <typename T, int kRows, typename Value = float>
struct RowVec {
  static constexpr int kSlots = MmaAtom<T>::kRowsPerLane;
  Value v[kRows / kAtom][kSlots];

  // f(value, m, slot) for every row.
  template <typename F>
  FX_DEVICE void for_each(F f) {
#pragma unroll
    for (int m = 0; m < kRows / kAtom; ++m)
#pragma unroll
      for (int s = 0; s < kSlots; ++s) f(v[m][s], m, s);
  }
  FX_DEVICE void fill(Value x) {
    for_each([&](Value& y, int, int) { y = x; });
  }
  // The same in all lanes that share a row.
  template <typename Op>
  FX_DEVICE void reduce_lanes(Op op) {
    for_each([&](Value& x, int, int) { x = MmaAtom<T>::row_reduce(x, op); });
  }
};

template <typename T, int kRows, int kCols>
struct AccTile {
  using Atom = MmaAtom<T>;
  static constexpr int kM = kRows / kAtom, kN = kCols / kAtom;
  typename Atom::Acc atom[kM][kN];

  // f(value, m, slot, col) for every element this lane holds; m and slot name its row.
  template <typename F>
  FX_DEVICE void for_each(F f) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < Atom::kAccRegs; ++i)
          f(atom[m][n].reg[i], m, Atom::row_slot(i), n * kAtom + Atom::col(i));
  }
  // f(number of the pair, m, slot, col) for the pairs of neighbouring columns this lane holds.
  static constexpr int kPairs = kM * kN * Atom::kAccRegs / 2;
  template <typename F>
  FX_DEVICE static void for_each_pair(F f) {
    static_assert(Atom::kColsInPairs);
    constexpr int kHalf = Atom::kAccRegs / 2;
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      f(j, j / kHalf / kN, Atom::row_slot(2 * (j % kHalf)),
        j / kHalf % kN * kAtom + Atom::col(2 * (j % kHalf)));
  }
  FX_DEVICE float* pair(int j) {
    constexpr int kHalf = Atom::kAccRegs / 2;
    return atom[j / kHalf / kN][j / kHalf % kN].reg + 2 * (j % kHalf);
  }
  FX_DEVICE void clear() {
    for_each([](float& x, int, int, int) { x = 0.f; });
  }
  // Rounds to T and writes to the rows of a tile from row0 on.
  template <typename Tile>
  FX_DEVICE void store(const Tile& t, int row0) const {
    constexpr int kStep = Atom::kColsInPairs ? 2 : 1;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < Atom::kAccRegs; i += kStep) {
          T* dst = t.data + t.offset(row0 + m * kAtom, n * kAtom, Atom::row(Atom::row_slot(i)),
                                     Atom::col(i));
          if constexpr (kStep == 2) {
            const T low = from_float<T>(atom[m][n].reg[i]);
            const T high = from_float<T>(atom[m][n].reg[i + 1]);
            *reinterpret_cast<uint32_t*>(dst) = reinterpret_cast<const uint16_t&>(low) |
                                                reinterpret_cast<const uint16_t&>(high) << 16;
          } else {
            *dst = from_float<T>(atom[m][n].reg[i]);
          }
        }
  }
  FX_DEVICE static int row(int m, int slot) { return m * kAtom + Atom::row(slot); }
  // This lane's first column: the others are constants away from it.
  FX_DEVICE static int first_col() { return Atom::col(0); }
  // Whether this lane, among those that share a row, is the one that speaks for it.
  FX_DEVICE static bool speaks_for_row() { return Atom::col(0) == 0; }
};

// A 16-bit operand tile in registers.
template <typename T, int kRows, int kCols>
struct OperandTile {
  using Atom = MmaAtom<T>;
  typename Atom::A atom[kRows / kAtom][kCols / kAtom];

  template <typename Tile>
  FX_DEVICE void load(const Tile& t, int row0) {
#pragma unroll
    for (int m = 0; m < kRows / kAtom; ++m)
#pragma unroll
      for (int k = 0; k < kCols / kAtom; ++k)
        atom[m][k] = Atom::load_a(t, row0 + m * kAtom, k * kAtom);
  }
  FX_DEVICE typename Atom::A get(int m, int k) const { return atom[m][k]; }
};

// The same, left in shared memory: rows from row0 on.
template <typename T, typename Tile>
struct SharedOperand {
  Tile tile;
  int row0;
  FX_DEVICE typename MmaAtom<T>::A get(int m, int k) const {
    return MmaAtom<T>::load_a(tile, row0 + m * kAtom, k * kAtom);
  }
};

// c[m, n] += a[m, k] * (b of atom n, k), for all atoms; each b is loaded one step before its use.
template <int kSteps, typename T, int kM, int kN, typename GetA, typename LoadB>
FX_DEVICE void mma_steps(AccTile<T, kM, kN>& c, GetA get_a, LoadB load_b) {
  using Atom = MmaAtom<T>;
  constexpr int kAtomsM = kM / kAtom, kAtomsN = kN / kAtom;
  typename Atom::A a[2][kAtomsM];
  typename Atom::B b[2];
#pragma unroll
  for (int m = 0; m < kAtomsM; ++m) a[0][m] = get_a(m, 0);
  b[0] = load_b(0, 0);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < kAtomsN; ++n) {
      const int step = k * kAtomsN + n;
      if (n + 1 < kAtomsN) {
        b[(step + 1) % 2] = load_b(n + 1, k);
      } else if (k + 1 < kSteps) {
        b[(step + 1) % 2] = load_b(0, k + 1);
#pragma unroll
        for (int m = 0; m < kAtomsM; ++m) a[(k + 1) % 2][m] = get_a(m, k + 1);
      }
#pragma unroll
      for (int m = 0; m < kAtomsM; ++m) Atom::mma(c.atom[m][n], a[k % 2][m], b[step % 2]);
    }
  }
}

// c[m, n] += a[m, k] * b[n, k]; b in shared memory, a an OperandTile or SharedOperand of kK columns.
template <int kK, typename T, int kM, int kN, typename Operand, typename Tile>
FX_DEVICE void mma_abt(AccTile<T, kM, kN>& c, const Operand& a, const Tile& b) {
  mma_steps<kK / kAtom>(
      c, [&](int m, int k) { return a.get(m, k); },
      [&](int n, int k) { return MmaAtom<T>::load_b(b, n * kAtom, k * kAtom); });
}

// c[m, n] += a[m, k] * b[k, n], likewise.
template <int kK, typename T, int kM, int kN, typename Operand, typename Tile>
FX_DEVICE void mma_ab(AccTile<T, kM, kN>& c, const Operand& a, const Tile& b) {
  mma_steps<kK / kAtom>(
      c, [&](int m, int k) { return a.get(m, k); },
      [&](int n, int k) { return MmaAtom<T>::load_b_transposed(b, n * kAtom, k * kAtom); });
}

// The same with an accumulator for a, rounded to T.
template <typename T, int kM, int kN, int kK, typename Tile>
FX_DEVICE void mma_ab(AccTile<T, kM, kN>& c, const AccTile<T, kM, kK>& a, const Tile& b) {
  mma_steps<kK / kAtom>(
      c, [&](int m, int k) { return MmaAtom<T>::to_operand(a.atom[m][k]); },
      [&](int n, int k) { return MmaAtom<T>::load_b_transposed(b, n * kAtom, k * kAtom); });
}

}  // namespace flash_ext
