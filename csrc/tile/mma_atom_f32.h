// float32 products on bfloat16 matrix units, as exact as with multiply-adds of float32.
#pragma once
#include "platform.h"
#include "shared_tile.h"
#include "split.h"

namespace flash_ext {

// Six of the nine products of parts: the three left out are below 2^-22 of the whole together, and
// of either sign. The cost is that of three products in TF32, which only NVIDIA has.
template <>
struct MmaAtom<float> : MmaAtom<bf16_t> {
  using Narrow = MmaAtom<bf16_t>;
  struct A {
    Narrow::A part[kParts];
  };
  struct B {
    Narrow::B part[kParts];
  };

  // Matrix units round sums towards zero, which adds up; so they sum one atom's products, smallest
  // first, and what has been summed before is added outside.
  FX_DEVICE static void mma(Acc& c, const A& a, const B& b) {
    Acc sum{};
    mma_apart(sum, sum, a, b);
#pragma unroll
    for (int i = 0; i < kAccRegs; ++i) c.reg[i] += sum.reg[i];
  }
  // The product of the first parts goes to `large`, the others, below 2^-6 of it, to `small`.
  FX_DEVICE static void mma_apart(Acc& large, Acc& small, const A& a, const B& b) {
    Narrow::mma(small, a.part[0], b.part[2]);
    Narrow::mma(small, a.part[2], b.part[0]);
    Narrow::mma(small, a.part[1], b.part[1]);
    Narrow::mma(small, a.part[0], b.part[1]);
    Narrow::mma(small, a.part[1], b.part[0]);
    Narrow::mma(large, a.part[0], b.part[0]);
  }

  template <typename Tile>
  FX_DEVICE static A load_a(const Tile& t, int row0, int k0) {
    A a;
#pragma unroll
    for (int p = 0; p < kParts; ++p) a.part[p] = Narrow::load_a(plane(t, p), row0, k0);
    return a;
  }
  template <typename Tile>  // t is [k, q]
  FX_DEVICE static A load_a_transposed(const Tile& t, int row0, int k0) {
    A a;
#pragma unroll
    for (int p = 0; p < kParts; ++p) a.part[p] = Narrow::load_a_transposed(plane(t, p), row0, k0);
    return a;
  }
  template <typename Tile>  // t is [n, k]
  FX_DEVICE static B load_b(const Tile& t, int n0, int k0) {
    B b;
#pragma unroll
    for (int p = 0; p < kParts; ++p) b.part[p] = Narrow::load_b(plane(t, p), n0, k0);
    return b;
  }
  template <typename Tile>  // t is [k, n]
  FX_DEVICE static B load_b_transposed(const Tile& t, int n0, int k0) {
    B b;
#pragma unroll
    for (int p = 0; p < kParts; ++p) b.part[p] = Narrow::load_b_transposed(plane(t, p), n0, k0);
    return b;
  }

  struct Parts {
    Acc of[kParts];
  };
  template <bool kFinite = false>
  FX_DEVICE static Parts parts(const Acc& c) {
    Parts parts;
#pragma unroll
    for (int i = 0; i < kAccRegs; ++i) {
      const Split x = split<kFinite>(c.reg[i]);
#pragma unroll
      for (int p = 0; p < kParts; ++p) parts.of[p].reg[i] = x.part[p];
    }
    return parts;
  }
  // An infinity becomes NaN: softmax has none, and this is in the innermost loop.
  FX_DEVICE static A to_operand(const Acc& c) {
    const Parts parts = MmaAtom::parts<true>(c);
    A a;
#pragma unroll
    for (int p = 0; p < kParts; ++p) a.part[p] = Narrow::to_operand(parts.of[p]);
    return a;
  }
};

}  // namespace flash_ext
