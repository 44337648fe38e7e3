#include "matrix.h"

#include <cstring>

namespace simt {
namespace {

// Element i of lane's operand is k(lane, i) of row (a) or column (b) lane % 16; register i of its
// accumulator is in row acc_row(lane, i) and column lane % 16.
#if defined(__GFX9__)
constexpr int k(int lane, int i) { return 4 * (lane / 16) + i; }
constexpr int acc_row(int lane, int i) { return 4 * (lane / 16) + i; }
#elif defined(__GFX12__)
constexpr int k(int lane, int i) { return 8 * (lane / 16) + i; }
constexpr int acc_row(int lane, int i) { return 8 * (lane / 16) + i; }
#else
constexpr int k(int, int i) { return i; }  // lanes 16 to 31 must hold what lanes 0 to 15 hold
constexpr int acc_row(int lane, int i) { return 2 * i + lane / 16; }
#endif

template <typename Operand>
struct Mine {
  Operand a, b;
  Acc c;
};

float value(_Float16 x) { return x; }
float value(short x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

template <typename Operand>
void multiply_all(Deposits& deposits) {
  using Lane = Mine<Operand>;
  static_assert(sizeof(Lane) <= Deposits::kBytes);
  const auto of = [&](int lane) -> Lane& { return *reinterpret_cast<Lane*>(deposits.of[lane]); };
  float a[16][16], b[16][16];  // both [k, ...]
  for (int lane = 0; lane < kWave; ++lane)
    for (int i = 0; i < kOperandRegs; ++i) {
      a[k(lane, i)][lane % 16] = value(of(lane).a[i]);
      b[k(lane, i)][lane % 16] = value(of(lane).b[i]);
    }
  float d[16][16] = {};
  for (int row = 0; row < 16; ++row)
    for (int step = 0; step < 16; ++step)
      for (int col = 0; col < 16; ++col) d[row][col] += a[step][row] * b[step][col];
  for (int lane = 0; lane < kWave; ++lane)
    for (int i = 0; i < kAccRegs; ++i) of(lane).c[i] += d[acc_row(lane, i)][lane % 16];
#if defined(__GFX11__)
  for (int lane = 0; lane < 16; ++lane)
    if (std::memcmp(&of(lane), &of(lane + 16), 2 * sizeof(Operand)))
      fail("wmma: lanes %d and %d hold different operands", lane, lane + 16);
#endif
}

template <typename Operand>
Acc multiply(const char* name, Operand a, Operand b, Acc c) {
  const Mine<Operand> mine{a, b, c};
  const Deposits& all = exchange(name, &mine, sizeof mine, true, multiply_all<Operand>);
  return reinterpret_cast<const Mine<Operand>*>(all.of[self->lane])->c;
}

}  // namespace

Acc multiply_f16(Half a, Half b, Acc c) { return multiply("a matrix product", a, b, c); }
Acc multiply_bf16(Bf16Bits a, Bf16Bits b, Acc c) { return multiply("a matrix product", a, b, c); }

}  // namespace simt
