#pragma once
#include <bit>
#include <cstdint>

namespace flash_ext {

// Divides numbers from 0 to 2^31 - 1 by a multiplication (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  int by = 1;
  uint32_t multiplier = 0;
  int shift = 0;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int by) : by(by) {
    if (by < 2) return;
    const int bits = std::bit_width(static_cast<uint32_t>(by) - 1);  // by <= 2^bits
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + by - 1) / by);
    shift = bits - 1;
  }
  constexpr int quotient(int x) const {
    if (by == 1) return x;
    return static_cast<int>(uint64_t{static_cast<uint32_t>(x)} * multiplier >> 32) >> shift;
  }
};

}  // namespace flash_ext
