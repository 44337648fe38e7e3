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

  FX_DEVICE T* at(int row, int col) const {
    const int chunk = (col / 8) ^ swizzle(row);
    return data + row * kCols + chunk * 8 + col % 8;
  }

 private:
  // Rows lie kChunks apart, of which the part modulo 8 (a bank line) counts: kSpread rows are
  // already apart from each other; the XOR moves the others.
  static constexpr int kLowBit = kChunks & -kChunks, kSpread = kLowBit < 8 ? kLowBit : 8;
  FX_DEVICE static int swizzle(int row) { return row / (8 / kSpread) % kSpread; }
};

}  // namespace flash_ext
