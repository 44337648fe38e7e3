#pragma once
#include "platform.h"

namespace flash_ext {

// A [kRows, kCols] tile of 16-bit values in shared memory, row-major. The 16-byte chunks of a row
// are XOR-swizzled by the row, so that eight neighbouring rows read at one column touch eight
// different groups of banks, whatever the width.
template <typename T, int kRows, int kCols>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kCols % 16 == 0);
  static constexpr int kChunks = kCols / 8;
  T* data;

  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + offset(0, 0, row, col); }

  // The same for addresses: what does not depend on the lane stands apart, so that it can become part
  // of the instruction.
  FX_DEVICE T* at(unsigned row0, unsigned col0, unsigned row, unsigned col) const {
    return data + (row0 * kCols + col0 / 64 * 64) + row * kCols + in_row(col0, row, col);
  }

  // Elements from data to (row0 + row, col0 + col), where row0 and col0 are multiples of 16 and row
  // and col below that: then what depends on the lane is the same for all (row0, col0) but for an
  // XOR of few values, and is computed once.
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    return row * kCols + in_row(col0, row, col) + (row0 * kCols + col0 / 64 * 64);
  }

 private:
  // Rows lie kChunks apart, of which the part modulo 8 (a bank line) counts: kSpread rows are
  // already apart from each other; the XOR moves the others.
  static constexpr unsigned kLowBit = kChunks & -kChunks, kSpread = kLowBit < 8 ? kLowBit : 8;
  FX_DEVICE static unsigned in_row(unsigned col0, unsigned row, unsigned col) {
    return ((col0 / 8 % 8) ^ (col / 8) ^ swizzle(row)) * 8 + col % 8;
  }
  FX_DEVICE static unsigned swizzle(unsigned row) { return row / (8 / kSpread) % kSpread; }
};

}  // namespace flash_ext
