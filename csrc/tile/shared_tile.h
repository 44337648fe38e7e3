#pragma once
#include "platform.h"

namespace flash_ext {

// A [kRows, kCols] tile of 16-bit values in shared memory, row-major. The 16-byte chunks of a row
// are XOR-swizzled by the row, so that eight neighbouring rows read at one column touch eight
// different groups of banks, whatever the width.
template <typename T, int kRowCount, int kColCount>
struct SharedTile {
  static constexpr int kRows = kRowCount, kCols = kColCount;
  static_assert(sizeof(T) == 2 && kCols % 16 == 0);
  static constexpr int kChunks = kCols / 8;
  T* data;

  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + offset(0, 0, row, col); }

  // Elements from data to (row0 + row, col0 + col), where row0 and col0 are multiples of 16 and row
  // and col below that: then what depends on the lane is the same for all (row0, col0) but for an
  // XOR of few values, and is computed once.
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    const unsigned chunk = (col0 / 8 % 8) ^ (col / 8) ^ swizzle(row);
    return row * kCols + chunk * 8 + col % 8 + (row0 * kCols + col0 / 64 * 64);
  }

 private:
  // Rows lie kChunks apart, of which the part modulo 8 (a bank line) counts: kSpread rows are
  // already apart from each other; the XOR moves the others.
  static constexpr unsigned kLowBit = kChunks & -kChunks, kSpread = kLowBit < 8 ? kLowBit : 8;
  FX_DEVICE static unsigned swizzle(unsigned row) { return row / (8 / kSpread) % kSpread; }
};

// The same with 16 bytes between the rows, an odd number of chunks apart, instead of the swizzle:
// more memory, but all places of a lane are one register and constants.
template <typename T, int kRowCount, int kColCount>
struct PaddedTile {
  static constexpr int kRows = kRowCount, kCols = kColCount;
  static_assert(sizeof(T) == 2 && kCols % 16 == 0);
  static constexpr int kStride = kCols + 8, kSize = kRows * kStride;
  T* data;

  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + offset(0, 0, row, col); }
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    return row * kStride + col + (row0 * kStride + col0);
  }
};

}  // namespace flash_ext
