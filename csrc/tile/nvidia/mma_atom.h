// mma.sync (sm_80 and newer).
#pragma once
#include <type_traits>
#include "../platform.h"

namespace flash_ext {

// acc[q, n] += a[q, k] * b[n, k] for one 16x16x16 block a warp; two m16n8k16 side by side.
// Lane layout of acc: https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
template <typename T>
struct MmaAtom {
  static constexpr int kAccRegs = 8;          // accumulators a lane holds
  static constexpr int kRowsPerLane = 2;      // ... which lie in this many rows
  static constexpr bool kColsInPairs = true;  // registers 2j and 2j + 1 are neighbours in a row
  static constexpr bool kQuads = true;        // four lanes share two rows of an atom
  struct A {
    uint32_t reg[4];
  };
  struct B {
    uint32_t reg[4];
  };
  struct Acc {
    float reg[kAccRegs];
  };

  FX_DEVICE static constexpr int row_slot(int i) { return (i / 2) % 2; }
  FX_DEVICE static int row(int slot) { return static_cast<int>(lane_id()) / 4 + 8 * slot; }
  FX_DEVICE static int col(int i) {
    return static_cast<int>(lane_id() % 4) * 2 + i % 2 + 8 * (i / 4);
  }

  // Four neighbouring lanes share a row.
  template <typename Op>
  FX_DEVICE static float row_reduce(float x, Op op) {
    x = op(x, shuffle_xor(x, 1));
    return op(x, shuffle_xor(x, 2));
  }

  // Of the four lanes of a quad, each holding four numbers: lane i gets the i-th of lane 0, 1, 2 and 3.
  FX_DEVICE static void transpose_lanes(uint32_t (&x)[4]) {
    const auto swap_with = [](int other, bool upper, uint32_t& low, uint32_t& high) {
      const uint32_t got = shuffle_xor(upper ? low : high, other);
      (upper ? low : high) = got;
    };
    const bool odd = lane_id() & 1, second = lane_id() & 2;
    swap_with(1, odd, x[0], x[1]), swap_with(1, odd, x[2], x[3]);
    swap_with(2, second, x[0], x[2]), swap_with(2, second, x[1], x[3]);
  }

  // A bit for each accumulator, made where eight rows of a column are known at once: this lane speaks for
  // the column eight_col(), of whose rows from eight_row() on bit(j) tells the j-th one's. Bit 4 i of the
  // result is that of this lane's register i.
  FX_DEVICE static int eight_col() {
    const unsigned lane = lane_id();
    return static_cast<int>(lane % 4 * 2 + lane / 4 % 2 + lane / 16 * 8);
  }
  FX_DEVICE static int eight_row() { return static_cast<int>(lane_id() / 8 % 2 * 8); }
  template <typename F>
  FX_DEVICE static uint32_t spread_eights(F bit) {
    uint32_t of_row[8];  // of the eight, the bits of all lanes
#pragma unroll
    for (int j = 0; j < 8; ++j) of_row[j] = __ballot_sync(0xffffffffu, bit(j));
    const unsigned row = lane_id() / 4;
#pragma unroll
    for (int half = 4; half > 0; half /= 2)
#pragma unroll
      for (int j = 0; j < half; ++j)
        of_row[j] = row & static_cast<unsigned>(half) ? of_row[j + half] : of_row[j];
    return of_row[0] >> lane_id() % 4 & 0x11111111u;
  }

  FX_DEVICE static void mma(Acc& c, const A& a, const B& b) {
    ptx::mma_m16n8k16<T>(c.reg + 0, a.reg, b.reg + 0);
    ptx::mma_m16n8k16<T>(c.reg + 4, a.reg, b.reg + 2);
  }

  FX_DEVICE static void pin(Acc&) {}  // see amd/mma_atom.h

  template <typename Tile>
  FX_DEVICE static A load_a(const Tile& t, int row0, int k0) {
    A a;
    ldmatrix<false>(a.reg, t, row0, k0, lane_id() % 16, lane_id() / 16 * 8);
    return a;
  }
  template <typename Tile>  // t is [k, q]
  FX_DEVICE static A load_a_transposed(const Tile& t, int row0, int k0) {
    A a;
    const unsigned row = lane_id() % 8 + lane_id() / 16 * 8;
    ldmatrix<true>(a.reg, t, k0, row0, row, lane_id() / 8 % 2 * 8);
    return a;
  }
  template <typename Tile>  // t is [n, k]
  FX_DEVICE static B load_b(const Tile& t, int n0, int k0) {
    B b;
    const unsigned row = lane_id() % 8 + lane_id() / 16 * 8;
    ldmatrix<false>(b.reg, t, n0, k0, row, lane_id() / 8 % 2 * 8);
    return b;
  }
  template <typename Tile>  // t is [k, n]
  FX_DEVICE static B load_b_transposed(const Tile& t, int n0, int k0) {
    B b;
    ldmatrix<true>(b.reg, t, k0, n0, lane_id() % 16, lane_id() / 16 * 8);
    return b;
  }

  // The accumulator layout is already the A-operand layout; only the type changes.
  FX_DEVICE static A to_operand(const Acc& c) {
    A a;
    for (int i = 0; i < 4; ++i) a.reg[i] = ptx::cvt<T>(c.reg[2 * i], c.reg[2 * i + 1]);
    return a;
  }

 private:
  // Four 8x8 matrices of the block at (row0, col0), of which this lane names the row at (row, col).
  // The tile's alignment lets the swizzle act on whole addresses: one XOR a column of blocks.
  template <bool kTrans, typename Tile>
  FX_DEVICE static void ldmatrix(uint32_t* r, const Tile& t, unsigned row0, unsigned col0,
                                 unsigned row, unsigned col) {
    const uint32_t lane = ptx::shared_address(t.data) + 2 * t.lane_offset(row, col);
    ptx::ldmatrix<kTrans>(r, (lane ^ 2 * t.flip(col0)) + 2 * t.jump(row0, col0));
  }
};

}  // namespace flash_ext
