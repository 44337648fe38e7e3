// All PTX of the portable kernels, each instruction a function of its name (sm_80 and newer). The
// lane emulator in the tests has these functions too; everything else it compiles unchanged.
// https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once
#include <cstdint>
#include <type_traits>

namespace flash_ext::ptx {

// Addresses of shared memory are 32 bits.
FX_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

FX_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FX_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to T, a half_t or bf16_t.
template <typename T>
FX_DEVICE uint32_t cvt(float low, float high) {
  uint32_t r;
  if constexpr (std::is_same_v<T, half_t>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Four 8x8 matrices of 16-bit values; lane i names row i % 8 of the (i / 8)-th.
template <bool kTrans>
FX_DEVICE void ldmatrix(uint32_t* r, uint32_t address) {
  if constexpr (kTrans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}

// c += a b, [16, 8] += [16, 16] [16, 8].
template <typename T>
FX_DEVICE void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b) {
  if constexpr (std::is_same_v<T, half_t>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from global to shared memory: the first `bytes` are read, the others zero.
FX_DEVICE void cp_async(void* dst_smem, const void* src, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(dst_smem)),
      "l"(src), "r"(bytes)
      : "memory");
}
// The same, all of them or none.
FX_DEVICE void cp_async_if(bool there, void* dst_smem, const void* src) {
  asm volatile(
      "{\n.reg .pred absent;\nsetp.eq.u32 absent, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, absent;\n}" ::"r"(
          shared_address(dst_smem)),
      "l"(src), "r"(static_cast<uint32_t>(there))
      : "memory");
}
FX_DEVICE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
FX_DEVICE void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

FX_DEVICE int ld_acquire(const int* src) {
  int x;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(src) : "memory");
  return x;
}
FX_DEVICE void st_release(int* dst, int x) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(dst), "r"(x) : "memory");
}

// What only sm_90 and newer have.
#if __CUDA_ARCH__ >= 900
inline constexpr bool kSm90 = true;

FX_DEVICE void red_add_v2(float* dst, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(dst), "f"(a), "f"(b)
               : "memory");
}
FX_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// dst[i] += src[i] by the copy engine; a group of its own.
FX_DEVICE void cp_reduce_async_bulk_add(float* dst, const float* src_smem, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\n"
      "cp.async.bulk.commit_group;" ::"l"(dst),
      "r"(shared_address(src_smem)), "r"(bytes)
      : "memory");
}
FX_DEVICE void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
FX_DEVICE void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
#else
inline constexpr bool kSm90 = false;

FX_DEVICE void red_add_v2(float*, float, float) {}
FX_DEVICE void fence_proxy_async() {}
FX_DEVICE void cp_reduce_async_bulk_add(float*, const float*, int) {}
FX_DEVICE void cp_async_bulk_wait_group_read() {}
FX_DEVICE void cp_async_bulk_wait_group() {}
#endif

}  // namespace flash_ext::ptx
