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

  FX_DEVICE static void mma(Acc& c, const A& a, const B& b) {
    mma_16x8(c.reg + 0, a.reg, b.reg + 0);
    mma_16x8(c.reg + 4, a.reg, b.reg + 2);
  }

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
    for (int i = 0; i < 4; ++i) a.reg[i] = pack(c.reg[2 * i], c.reg[2 * i + 1]);
    return a;
  }

 private:
  FX_DEVICE static void mma_16x8(float* c, const uint32_t* a, const uint32_t* b) {
    if constexpr (std::is_same_v<T, half_t>)
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    else
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
          "{%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  // Four 8x8 matrices of the block at (row0, col0), of which this lane names the row at (row, col).
  // The tile's alignment lets the swizzle act on whole addresses: one XOR a column of blocks.
  template <bool kTrans, typename Tile>
  FX_DEVICE static void ldmatrix(uint32_t* r, const Tile& t, unsigned row0, unsigned col0,
                                 unsigned row, unsigned col) {
    const uint32_t lane =
        static_cast<uint32_t>(__cvta_generic_to_shared(t.data)) + 2 * t.lane_offset(row, col);
    const uint32_t addr = (lane ^ 2 * t.flip(col0)) + 2 * t.jump(row0, col0);
    if constexpr (kTrans)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(addr));
    else
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(addr));
  }
  FX_DEVICE static uint32_t pack(float lo, float hi) {
    uint32_t r;
    if constexpr (std::is_same_v<T, half_t>)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
  }
};

}  // namespace flash_ext
