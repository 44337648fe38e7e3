#include "mma.h"

#include <cstring>

#include "simt.h"

namespace simt {
namespace {

// PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type": lane = 4 * group + t.
// a: registers 0 to 3 hold rows group, group + 8, group, group + 8 and columns 2t, 2t + 1, from the
// third on 8 further; b: rows 2t, 2t + 1, in the second 8 further, of column group; c: rows group
// (two registers) and group + 8, columns 2t, 2t + 1.
struct Lane {
  uint32_t a[4], b[2];
  float c[4];
};
static_assert(sizeof(Lane) <= Deposits::kBytes);

float value(uint32_t pair, int i, bool half) {
  const uint16_t bits = pair >> 16 * i;
  return half ? float(__builtin_bit_cast(_Float16, bits))
              : __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16);
}

template <bool kHalf>
void multiply_all(Deposits& deposits) {
  const auto of = [&](int lane) -> Lane& { return *reinterpret_cast<Lane*>(deposits.of[lane]); };
  float a[16][16], b[16][8], c[16][8] = {};
  for (int lane = 0; lane < kWave; ++lane)
    for (int i = 0; i < 2; ++i) {
      const int group = lane / 4, t = lane % 4;
      for (int reg = 0; reg < 4; ++reg)
        a[group + 8 * (reg % 2)][2 * t + i + 8 * (reg / 2)] = value(of(lane).a[reg], i, kHalf);
      for (int reg = 0; reg < 2; ++reg)
        b[2 * t + i + 8 * reg][group] = value(of(lane).b[reg], i, kHalf);
    }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int col = 0; col < 8; ++col) c[row][col] += a[row][k] * b[k][col];
  for (int lane = 0; lane < kWave; ++lane)
    for (int reg = 0; reg < 4; ++reg)
      of(lane).c[reg] += c[lane / 4 + 8 * (reg / 2)][2 * (lane % 4) + reg % 2];
}

}  // namespace

void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool half) {
  Lane mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  std::memcpy(mine.c, c, sizeof mine.c);
  const Deposits& all =
      half ? exchange("mma.f16", &mine, sizeof mine, true, multiply_all<true>)
           : exchange("mma.bf16", &mine, sizeof mine, true, multiply_all<false>);
  std::memcpy(c, reinterpret_cast<const Lane*>(all.of[self->lane])->c, sizeof mine.c);
}

}  // namespace simt
