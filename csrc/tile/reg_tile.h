// Register tiles: a [kRows, kCols] float32 accumulator spread over a warp, and what attention does
// to it. No vendor names below: every layout question is put to MmaAtom.
#pragma once
#include "atomic.h"
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

// Rounds an atom's accumulators to T and writes them to a tile.
template <typename T, typename Tile>
FX_DEVICE void store_atom(const typename MmaAtom<T>::Acc& acc, const Tile& t, int row0, int col0) {
  using Atom = MmaAtom<T>;
  constexpr int kStep = Atom::kColsInPairs ? 2 : 1;
#pragma unroll
  for (int i = 0; i < Atom::kAccRegs; i += kStep) {
    T* dst = t.data + t.offset(row0, col0, Atom::row(Atom::row_slot(i)), Atom::col(i));
    if constexpr (kStep == 2) {
      const T low = from_float<T>(acc.reg[i]), high = from_float<T>(acc.reg[i + 1]);
      *reinterpret_cast<uint32_t*>(dst) =
          reinterpret_cast<const uint16_t&>(low) | reinterpret_cast<const uint16_t&>(high) << 16;
    } else {
      *dst = from_float<T>(acc.reg[i]);
    }
  }
}

// kEvery: the tile is every kEvery-th column of atoms of a wider one, as the warps that share the
// wider one divide it; col below and in for_each then counts columns of the narrow one.
template <typename T, int kRows, int kCols, int kEvery = 1>
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
  template <typename F>
  FX_DEVICE void for_each(F f) const {
    const_cast<AccTile*>(this)->for_each(
        [&](const float& x, int m, int slot, int col) { f(x, m, slot, col); });
  }
  // f(value, value of other, m, slot, col) likewise.
  template <typename F>
  FX_DEVICE void for_each(AccTile& other, F f) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < Atom::kAccRegs; ++i)
          f(atom[m][n].reg[i], other.atom[m][n].reg[i], m, Atom::row_slot(i),
            n * kAtom + Atom::col(i));
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
  // Rounds to T and writes to a tile, from (row0, col0) on; col0 is known to the compiler.
  template <typename Tile>
  FX_DEVICE void store(const Tile& t, int row0, int col0 = 0) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        if constexpr (std::is_same_v<T, float>) {
          const auto parts = Atom::parts(atom[m][n]);
#pragma unroll
          for (int p = 0; p < kParts; ++p)
            store_atom<bf16_t>(parts.of[p], plane(t, p), row0 + m * kAtom,
                               col0 + n * kAtom * kEvery);
        } else {
          store_atom<T>(atom[m][n], t, row0 + m * kAtom, col0 + n * kAtom * kEvery);
        }
      }
  }
  // put(address, value) or put(address, value, the next column's) for every element, where
  // row(m, slot) is {address of column 0, null for none; what to flip in the bits of columns}.
  template <typename Row, typename Put>
  FX_DEVICE void put_rows(Row row, Put put) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int slot = 0; slot < Atom::kRowsPerLane; ++slot) {
        const auto [dst, flip] = row(m, slot);
        if (!dst) continue;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int i = 0; i < Atom::kAccRegs; ++i) {
            if (Atom::row_slot(i) != slot) continue;
            const float* x = atom[m][n].reg + i;
            float* at = dst + ((n * kAtom * kEvery + Atom::col(i)) ^ flip);
            if constexpr (!Atom::kColsInPairs) put(at, x[0]);
            else if (i % 2 == 0) put(at, x[0], x[1]);
          }
      }
  }
  FX_DEVICE static int row(int m, int slot) { return m * kAtom + Atom::row(slot); }
  // This lane's first column: the others are constants away from it.
  FX_DEVICE static int first_col() { return Atom::col(0); }
  // Whether this lane, among those that share a row, is the one that speaks for it.
  FX_DEVICE static bool speaks_for_row() { return Atom::col(0) == 0; }
};

// An operand tile in registers.
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
template <int kSteps, typename T, int kM, int kN, int kEvery, typename GetA, typename LoadB>
FX_DEVICE void mma_steps(AccTile<T, kM, kN, kEvery>& c, GetA get_a, LoadB load_b) {
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
#pragma unroll
  for (int m = 0; m < kAtomsM; ++m)
#pragma unroll
    for (int n = 0; n < kAtomsN; ++n) Atom::pin(c.atom[m][n]);
}

// c[m, n] += a[m, k] * b[n, k]; b in shared memory, a an OperandTile or SharedOperand of kK columns.
template <int kK, typename T, int kM, int kN, typename Operand, typename Tile>
FX_DEVICE void mma_abt(AccTile<T, kM, kN>& c, const Operand& a, const Tile& b) {
  mma_steps<kK / kAtom>(
      c, [&](int m, int k) { return a.get(m, k); },
      [&](int n, int k) { return MmaAtom<T>::load_b(b, n * kAtom, k * kAtom); });
}

// c[m, n] = a[m, k] * b[n, k], likewise. float32: where its small products have a sum of their own,
// the large ones of up to 128 columns are few enough to be summed in the matrix units, see
// MmaAtom<float>::mma.
template <int kK, typename T, int kM, int kN, typename Operand, typename Tile>
FX_DEVICE void product_abt(AccTile<T, kM, kN>& c, const Operand& a, const Tile& b) {
  c.clear();
  if constexpr (std::is_same_v<T, float> && kK <= 128) {
    using Atom = MmaAtom<float>;
    AccTile<float, kM, kN> small;
    small.clear();
#pragma unroll
    for (int k = 0; k < kK / kAtom; ++k) {
      typename Atom::A x[kM / kAtom];
#pragma unroll
      for (int m = 0; m < kM / kAtom; ++m) x[m] = a.get(m, k);
#pragma unroll
      for (int n = 0; n < kN / kAtom; ++n) {
        const typename Atom::B y = Atom::load_b(b, n * kAtom, k * kAtom);
#pragma unroll
        for (int m = 0; m < kM / kAtom; ++m)
          Atom::mma_apart(c.atom[m][n], small.atom[m][n], x[m], y);
      }
    }
    c.for_each(small, [](float& x, float y, int, int, int) { x += y; });
  } else {
    mma_abt<kK>(c, a, b);
  }
}

// c[m, n] += a[m, k] * b[k, n]; a an accumulator, rounded to T; b in shared memory.
template <typename T, int kM, int kN, int kK, typename Tile>
FX_DEVICE void mma_ab(AccTile<T, kM, kN>& c, const AccTile<T, kM, kK>& a, const Tile& b) {
  mma_steps<kK / kAtom>(
      c, [&](int m, int k) { return MmaAtom<T>::to_operand(a.atom[m][k]); },
      [&](int n, int k) { return MmaAtom<T>::load_b_transposed(b, n * kAtom, k * kAtom); });
}

}  // namespace flash_ext
