// From tensors of any strides to tiles in shared memory, and back.
#pragma once
#include <algorithm>

#include "../tile/async_copy.h"
#include "../tile/shared_tile.h"

namespace flash_ext {

// The first `count` of eight 16-bit values at any address, then zeros.
template <typename T>
FX_DEVICE uint4 load_elements(const T* src, int count) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(src);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) word[i / 2] |= uint32_t{bits[i]} << (16 * (i % 2));
  return {word[0], word[1], word[2], word[3]};
}

struct Place {
  int row, col;
};

// Which 16-byte chunks a thread copies. As many neighbouring threads as a power of two allows share
// a row; where that is not all of it, they go on in the same row in the next step.
template <int kThreads, int kRows, int kChunks>
struct Chunks {
  static constexpr int kWide = kChunks & -kChunks, kColSteps = kChunks / kWide;
  static constexpr int kRowStep = kThreads / kWide;
  static constexpr int kSteps = kColSteps * ((kRows + kRowStep - 1) / kRowStep);

  FX_DEVICE static int row() { return static_cast<int>(threadIdx.x / kWide); }
  FX_DEVICE static int col() { return static_cast<int>(threadIdx.x % kWide) * 8; }
  FX_DEVICE static constexpr int row_of(int step) { return step / kColSteps * kRowStep; }
  FX_DEVICE static constexpr int col_of(int step) { return step % kColSteps * kWide * 8; }
  FX_DEVICE static Place at(int step) { return {row() + row_of(step), col() + col_of(step)}; }
};

// Starts to copy rows that lie `stride` apart, 16-byte aligned, into a tile. mine: this thread's
// first chunk. Rows from `rows` (kWhole: none) and columns from `cols` on become zero and are not
// read.
template <int kThreads, bool kWhole, typename Tile, typename T>
FX_DEVICE void load_rows(Tile dst, const T* mine, int64_t stride, int rows, int cols) {
  using Mine = Chunks<kThreads, Tile::kRows, Tile::kCols / 8>;
#pragma unroll
  for (int step = 0; step < Mine::kSteps; ++step) {
    const auto [row, col] = Mine::at(step);
    if (Tile::kRows % Mine::kRowStep && row >= Tile::kRows) break;
    copy_async(dst.at(row, col), mine + Mine::row_of(step) * stride + Mine::col_of(step),
               (kWhole || row < rows) && col < cols);
  }
}

// Starts to copy the rows [row0, row0 + kRows) of a matrix into a tile; rows from `rows` and columns
// from `cols` on, which are not there, become zero and are not read. address(row) is where a row
// starts. in_chunks: every row is aligned to 16 bytes; kInChunks: that is known.
template <int kThreads, bool kInChunks, typename Tile, typename Address>
FX_DEVICE void load_tile(Tile dst, Address address, int row0, int rows, int cols, bool in_chunks) {
  constexpr int kRows = Tile::kRows, kChunks = Tile::kCols / 8;
  if ((kInChunks || in_chunks) && cols % 8 == 0) {
    using Mine = Chunks<kThreads, kRows, kChunks>;
#pragma unroll
    for (int step = 0; step < Mine::kSteps; ++step) {
      const auto [row, col] = Mine::at(step);
      if (kRows % Mine::kRowStep && row >= kRows) break;
      const bool there = row0 + row < rows && col < cols;
      copy_async(dst.at(row, col), address(row0 + row) + col, there);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, col = i % kChunks * 8;
      const int count = row0 + row < rows ? std::clamp(cols - col, 0, 8) : 0;
      *reinterpret_cast<uint4*>(dst.at(row, col)) = load_elements(address(row0 + row) + col, count);
    }
  }
}

// The other way round.
template <int kThreads, bool kInChunks, typename Tile, typename Address>
FX_DEVICE void store_tile(Tile src, Address address, int row0, int rows, int cols,
                          bool in_chunks) {
  constexpr int kRows = Tile::kRows, kChunks = Tile::kCols / 8;
#pragma unroll(kInChunks ? 4 : 1)
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    if (row0 + row >= rows || col >= cols) continue;
    auto* dst = address(row0 + row) + col;
    if (kInChunks || in_chunks) {
      *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(src.at(row, col));
    } else {
      const int count = std::min(cols - col, 8);
      for (int c = 0; c < count; ++c) dst[c] = src.at(row, col)[c];
    }
  }
}

}  // namespace flash_ext
