// From tensors of any strides to tiles in shared memory, and back.
#pragma once
#include <algorithm>

#include "../tile/async_copy.h"
#include "../tile/shared_tile.h"
#include "../tile/split.h"
#include "params.h"

namespace flash_ext {

// Whether every row is aligned to 16 bytes.
FX_HOST_DEVICE bool in_chunks(const TensorView& t, int element_bytes) {
  return (reinterpret_cast<uintptr_t>(t.data) |
          (t.batch_stride | t.head_stride | t.seq_stride) * element_bytes) %
             16 ==
         0;
}

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
template <int kThreads, int kRows, int kChunks, int kElements = 8>
struct Chunks {
  static constexpr int kWide = std::min(kChunks & -kChunks, kThreads);
  static constexpr int kColSteps = kChunks / kWide;
  static constexpr int kRowStep = kThreads / kWide;
  static constexpr int kSteps = kColSteps * ((kRows + kRowStep - 1) / kRowStep);

  FX_DEVICE static int row() { return static_cast<int>(threadIdx.x / kWide); }
  FX_DEVICE static int col() { return static_cast<int>(threadIdx.x % kWide) * kElements; }
  FX_DEVICE static constexpr int row_of(int step) { return step / kColSteps * kRowStep; }
  FX_DEVICE static constexpr int col_of(int step) { return step % kColSteps * kWide * kElements; }
  FX_DEVICE static Place at(int step) { return {row() + row_of(step), col() + col_of(step)}; }
};

// Starts to copy rows of 16-byte chunks, which lie `stride` apart, into a tile; `mine` is where this
// thread's first chunk is. Rows from `rows` (kWhole: none is missing) and columns from `cols` on
// become zero and are not read.
template <int kThreads, bool kWhole, template <typename, int, int> class Tile, typename T,
          int kRows, int kCols>
FX_DEVICE void load_rows(Tile<T, kRows, kCols> dst, const T* mine, int64_t stride, int rows,
                         int cols) {
  using Mine = Chunks<kThreads, kRows, kCols / 8>;
#pragma unroll
  for (int step = 0; step < Mine::kSteps; ++step) {
    const auto [row, col] = Mine::at(step);
    if (kRows % Mine::kRowStep && row >= kRows) break;
    copy_async_if((kWhole || row < rows) && col < cols, dst.at(row, col),
                  mine + Mine::row_of(step) * stride + Mine::col_of(step));
  }
}

// Starts to copy the rows [row0, row0 + kRows) of a matrix into a tile; rows from `rows` and columns
// from `cols` on, which are not there, become zero and are not read. address(row) is where a row
// starts. in_chunks: every row is aligned to 16 bytes; kInChunks: that is known.
template <int kThreads, bool kInChunks, template <typename, int, int> class Tile, typename T,
          int kRows, int kCols, typename Address>
FX_DEVICE void load_tile(Tile<T, kRows, kCols> dst, Address address, int row0, int rows, int cols,
                         bool in_chunks) {
  constexpr int kChunks = kCols / 8;
  if (kInChunks || in_chunks) {
    using Mine = Chunks<kThreads, kRows, kChunks>;
#pragma unroll
    for (int step = 0; step < Mine::kSteps; ++step) {
      const auto [row, col] = Mine::at(step);
      if (kRows % Mine::kRowStep && row >= kRows) break;
      const int count = row0 + row < rows ? std::clamp(cols - col, 0, 8) : 0;
      // AMD's copy reads 16 bytes in any case: where nothing is wanted, those of a row that is there.
      const bool skip = kAmd && count == 0;
      copy_async(dst.at(row, col), address(skip ? row0 : row0 + row) + (skip ? 0 : col), 2 * count);
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
template <int kThreads, bool kInChunks, template <typename, int, int> class Tile, typename T,
          int kRows, int kCols, typename Address>
FX_DEVICE void store_tile(Tile<T, kRows, kCols> src, Address address, int row0, int rows, int cols,
                          bool in_chunks) {
  constexpr int kChunks = kCols / 8;
#pragma unroll kInChunks ? 4 : 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * 8;
    if (row0 + row >= rows || col >= cols) continue;
    T* dst = address(row0 + row) + col;
    if (kInChunks || in_chunks) {
      *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(src.at(row, col));
    } else {
      const int count = std::min(cols - col, 8);
      for (int c = 0; c < count; ++c) dst[c] = src.at(row, col)[c];
    }
  }
}

// float32: chunks of four, which are split on their way into a tile.
template <int kThreads, int kRows, int kCols>
using FloatChunks = Chunks<kThreads, kRows, kCols / 4, 4>;

// The first `count` of four floats, then zeros. in_chunks: src is aligned to 16 bytes; kInChunks:
// that is known, and `count` is 0 or 4.
template <bool kInChunks>
FX_DEVICE float4 load_floats(const float* src, int count, bool in_chunks) {
  if ((kInChunks || in_chunks) && count == 4) return *reinterpret_cast<const float4*>(src);
  float x[4] = {};
  if constexpr (!kInChunks)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) x[i] = src[i];
  return {x[0], x[1], x[2], x[3]};
}

template <int kRows, int kCols>
FX_DEVICE void split_into(SharedTile<float, kRows, kCols> dst, Place place, float4 four) {
  const Split x = split(four.x), y = split(four.y), z = split(four.z), w = split(four.w);
#pragma unroll
  for (int p = 0; p < kParts; ++p)
    *reinterpret_cast<uint2*>(plane(dst, p).at(place.row, place.col)) = {
        pack_parts(x.part[p], y.part[p]), pack_parts(z.part[p], w.part[p])};
}

// load_tile of float32: through registers, done when it returns. Several chunks are read before the
// first is split, so that their reads do not wait for each other.
template <int kThreads, bool kInChunks, int kRows, int kCols, typename Address>
FX_DEVICE void load_tile(SharedTile<float, kRows, kCols> dst, Address address, int row0, int rows,
                         int cols, bool in_chunks) {
  using Mine = FloatChunks<kThreads, kRows, kCols>;
  constexpr int kTogether = kInChunks ? std::min(8, Mine::kSteps) : 1;
#pragma unroll kInChunks ? Mine::kSteps : 1
  for (int first = 0; first < Mine::kSteps; first += kTogether) {
    float4 four[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const auto [row, col] = Mine::at(first + i);
      const int count = row < kRows && row0 + row < rows ? std::clamp(cols - col, 0, 4) : 0;
      four[i] = load_floats<kInChunks>(address(row0 + row) + col, count, in_chunks);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (const Place place = Mine::at(first + i); first + i < Mine::kSteps && place.row < kRows)
        split_into(dst, place, four[i]);
  }
}

// Where float32 rows wait, as they are in global memory, until they are split: so their copy can
// run while the warp goes on. Each thread splits what it has copied itself; no barrier lies between.
template <int kThreads, bool kInChunks, int kRows, int kCols>
struct Staging {
  using Mine = FloatChunks<kThreads, kRows, kCols>;
  float* smem;  // [kRows, kCols]

  template <typename Address>
  FX_DEVICE void start(Address address, int row0, int rows, int cols, bool in_chunks) const {
#pragma unroll kInChunks ? Mine::kSteps : 1
    for (int step = 0; step < Mine::kSteps; ++step) {
      const auto [row, col] = Mine::at(step);
      if (kRows % Mine::kRowStep && row >= kRows) break;
      const int count = row0 + row < rows ? std::clamp(cols - col, 0, 4) : 0;
      const float* src = address(row0 + row) + col;
      if (kInChunks || in_chunks) copy_async(at(row, col), src, 4 * count);
      else *at(row, col) = load_floats<false>(src, count, false);
    }
  }
  // After copy_wait.
  FX_DEVICE void finish(SharedTile<float, kRows, kCols> dst) const {
#pragma unroll
    for (int step = 0; step < Mine::kSteps; ++step) {
      const Place place = Mine::at(step);
      if (kRows % Mine::kRowStep && place.row >= kRows) break;
      split_into(dst, place, *at(place.row, place.col));
    }
  }

 private:
  FX_DEVICE float4* at(int row, int col) const {
    return reinterpret_cast<float4*>(smem + row * kCols + col);
  }
};

template <int kThreads, bool kInChunks, int kRows, int kCols, typename Address>
FX_DEVICE void store_tile(SharedTile<float, kRows, kCols> src, Address address, int row0, int rows,
                          int cols, bool in_chunks) {
  constexpr int kChunks = kCols / 4;
#pragma unroll kInChunks ? 4 : 1
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, col = i % kChunks * 4;
    if (row0 + row >= rows || col >= cols) continue;
    const auto part = [&](int p) {
      return *reinterpret_cast<const uint2*>(plane(src, p).at(row, col));
    };
    const uint2 a = part(0), b = part(1), c = part(2);
    const float x[4] = {join_low(a.x, b.x, c.x), join_high(a.x, b.x, c.x),  //
                        join_low(a.y, b.y, c.y), join_high(a.y, b.y, c.y)};
    float* dst = address(row0 + row) + col;
    if (kInChunks || in_chunks) {
      *reinterpret_cast<float4*>(dst) = {x[0], x[1], x[2], x[3]};
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (col + c < cols) dst[c] = x[c];
    }
  }
}

}  // namespace flash_ext
