#pragma once
#include "platform.h"

namespace flash_ext {

// A [kRows, kCols] tile of 16-bit values in shared memory, row-major, aligned to 128 bytes. The
// 16-byte chunks of a row are XOR-swizzled by the row, so that eight neighbouring rows read at one
// column touch eight different groups of banks, whatever the width.
template <typename T, int kRows, int kCols>
struct SharedTile {
  static_assert(sizeof(T) == 2 && kCols % 16 == 0);
  static constexpr int kBytes = kRows * kCols * 2;
  T* data;

  FX_DEVICE static SharedTile in(unsigned char* smem) { return {reinterpret_cast<T*>(smem)}; }

  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + lane_offset(row, col); }

  // The part that starts at a row, a multiple of 16.
  FX_DEVICE SharedTile below(unsigned row0) const { return {data + row0 * kCols}; }

  // Elements from data to (row0 + row, col0 + col), where row0 and col0 are multiples of 16 and row
  // and col below that: lane_offset(row, col), computed once, with its bits flip(col0) flipped,
  // plus jump(row0, col0), which the instruction itself adds.
  FX_DEVICE static unsigned lane_offset(unsigned row, unsigned col) {
    return row * kCols + in_row(row, col);
  }
  FX_DEVICE static constexpr unsigned flip(unsigned col0) { return col0 % (8 * kSpread); }
  FX_DEVICE static constexpr unsigned jump(unsigned row0, unsigned col0) {
    return row0 * kCols + col0 - flip(col0);
  }
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    return (lane_offset(row, col) ^ flip(col0)) + jump(row0, col0);
  }

  // The same as an address, for AMD's compiler: each part that it knows stands apart, and becomes
  // part of the instruction. flipped: see ColumnsOf.
  FX_DEVICE T* at(unsigned row0, unsigned col0, unsigned row, unsigned col,
                  unsigned flipped = 0) const {
    return data + jump(row0, col0) + row * kCols + (in_row(row, col) ^ flipped ^ flip(col0));
  }

 private:
  // Rows lie kChunks apart, of which the part modulo 8 (a bank line) counts: kSpread rows are
  // already apart from each other; the XOR moves the others.
  static constexpr unsigned kChunks = kCols / 8, kLowBit = kChunks & -kChunks;
  static constexpr unsigned kSpread = kLowBit < 8 ? kLowBit : 8;
  FX_DEVICE static unsigned in_row(unsigned row, unsigned col) {
    return (col / 8 ^ row / (8 / kSpread) % kSpread) * 8 + col % 8;
  }
};

// The same, but for 16 bytes after each row instead of the swizzle: rows are an odd number of chunks
// apart. It takes more memory, and all addresses of a lane are one register and constants.
template <typename T, int kRows, int kCols>
struct PaddedTile {
  static_assert(sizeof(T) == 2 && kCols % 16 == 0);
  static constexpr int kStride = kCols + 8, kBytes = kRows * kStride * 2;
  T* data;

  FX_DEVICE static PaddedTile in(unsigned char* smem) { return {reinterpret_cast<T*>(smem)}; }

  FX_DEVICE T* at(unsigned row, unsigned col) const { return data + lane_offset(row, col); }
  FX_DEVICE static unsigned lane_offset(unsigned row, unsigned col) { return row * kStride + col; }
  FX_DEVICE static constexpr unsigned flip(unsigned) { return 0; }
  FX_DEVICE static constexpr unsigned jump(unsigned row0, unsigned col0) {
    return row0 * kStride + col0;
  }
  FX_DEVICE static unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) {
    return lane_offset(row, col) + jump(row0, col0);
  }
};

// A tile from column col0 on, a multiple of 16 that need not be known to the compiler. Columns that
// are asked for must have none of col0's bits: then their sum is an XOR.
template <typename Tile>
struct ColumnsOf : Tile {
  unsigned first;  // what of col0 is flipped: like the lane's part, computed once

  FX_DEVICE ColumnsOf(const Tile& tile, unsigned col0)
      : Tile{tile.data + Tile::jump(0, col0)}, first(Tile::flip(col0)) {}
  FX_DEVICE auto at(unsigned row, unsigned col) const { return this->data + lane_offset(row, col); }
  FX_DEVICE auto at(unsigned row0, unsigned col0, unsigned row, unsigned col) const {
    return Tile::at(row0, col0, row, col, first);
  }
  FX_DEVICE unsigned lane_offset(unsigned row, unsigned col) const {
    return Tile::lane_offset(row, col) ^ first;
  }
  FX_DEVICE unsigned offset(unsigned row0, unsigned col0, unsigned row, unsigned col) const {
    return (lane_offset(row, col) ^ Tile::flip(col0)) + Tile::jump(row0, col0);
  }
};

// float32 values lie there split (split.h): three bfloat16 tiles, `planes`, one behind the other.
template <int kRows, int kCols>
struct SharedTile<float, kRows, kCols> : SharedTile<bf16_t, kRows, kCols> {
  static constexpr int kPlane = kRows * kCols;  // elements
  static constexpr int kBytes = 3 * SharedTile<bf16_t, kRows, kCols>::kBytes;

  FX_DEVICE static SharedTile in(unsigned char* smem) {
    return {{reinterpret_cast<bf16_t*>(smem)}};
  }
  FX_DEVICE SharedTile below(unsigned row0) const { return {{this->data + row0 * kCols}}; }
};

// The p-th plane of a float32 tile, or of a part of one: to be used as a bfloat16 tile.
template <typename Tile>
FX_DEVICE Tile plane(Tile t, int p) {
  t.data += p * Tile::kPlane;
  return t;
}

}  // namespace flash_ext
