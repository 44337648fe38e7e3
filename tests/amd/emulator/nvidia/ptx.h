// csrc/tile/nvidia/ptx.h for the lane emulator: the same functions, by the figures of the PTX manual.
// Asynchronous copies happen as late as they may: what reads before it has waited reads NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "async.h"
#include "mma.h"
#include "simt.h"

namespace flash_ext { extern thread_local unsigned char smem[]; }

namespace flash_ext::ptx {

FX_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - smem);
}

FX_DEVICE float ex2(float x) {  // denormals are zero
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.f : y;
}

FX_DEVICE float rcp(float x) { return 1.f / x; }

template <typename T>
FX_DEVICE uint32_t cvt(float low, float high) {
  T pair[2];
  if constexpr (std::is_same_v<T, half_t>)
    pair[0] = __float2half(low), pair[1] = __float2half(high);
  else pair[0] = __float2bfloat16(low), pair[1] = __float2bfloat16(high);
  uint32_t r;
  std::memcpy(&r, pair, sizeof r);
  return r;
}

template <bool kTrans>
FX_DEVICE void ldmatrix(uint32_t* r, uint32_t address) {
  if (address % 16) simt::fail("ldmatrix: address %u", address);
  const simt::Deposits& all = simt::exchange("ldmatrix", &address, sizeof address, true);
  const unsigned lane = simt::self->lane, group = lane / 4, pair = lane % 4 * 2;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto value = [&](unsigned row, unsigned col) -> uint32_t {
      uint32_t start;
      std::memcpy(&start, all.of[8 * matrix + row], sizeof start);
      return *reinterpret_cast<const uint16_t*>(smem + start + 2 * col);
    };
    r[matrix] = kTrans ? value(pair, group) | value(pair + 1, group) << 16
                       : value(group, pair) | value(group, pair + 1) << 16;
  }
}

template <typename T>
FX_DEVICE void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b) {
  simt::mma_m16n8k16(c, a, b, std::is_same_v<T, half_t>);
}

FX_DEVICE void cp_async(void* dst_smem, const void* src, int bytes) {
  simt::cp_async(dst_smem, src, bytes);
}
FX_DEVICE void cp_async_if(bool there, void* dst_smem, const void* src) {
  simt::cp_async(dst_smem, src, there ? 16 : 0);
}
FX_DEVICE void cp_async_commit_group() { simt::cp_async_commit_group(); }
template <int kNewest>
FX_DEVICE void cp_async_wait_group() {
  simt::cp_async_wait_group(kNewest);
}

FX_DEVICE int ld_acquire(const int* src) { return simt::load_without_waiting(src); }
FX_DEVICE void st_release(int* dst, int x) { *dst = x; }

inline constexpr bool kSm90 = simt::kSm90;

FX_DEVICE void red_add_v2(float* dst, float a, float b) {
  if (reinterpret_cast<uintptr_t>(dst) % 8) simt::fail("red.v2: address %p", dst);
  dst[0] += a, dst[1] += b;
}
FX_DEVICE void fence_proxy_async() { simt::fence_proxy_async(); }
FX_DEVICE void cp_reduce_async_bulk_add(float* dst, const float* src_smem, int bytes) {
  simt::cp_reduce_async_bulk_add(dst, src_smem, bytes);
}
FX_DEVICE void cp_async_bulk_wait_group_read() { simt::cp_async_bulk_wait_group(); }
FX_DEVICE void cp_async_bulk_wait_group() { simt::cp_async_bulk_wait_group(); }

}  // namespace flash_ext::ptx
