// wgmma: products of a warpgroup, which run while its warps go on.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once
#include "../tile/reg_tile.h"
#include "swizzled_tile.h"

namespace flash_ext::sm90 {

// What the registers of a warp hold of a [64, kCols] accumulator is an AccTile of its own 16 rows,
// and what they hold of a left operand an OperandTile: the layouts are those of mma.sync.

// Products read registers and shared memory as they were written before this.
FX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
FX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kNewest groups are still under way.
template <int kNewest>
FX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
}
// After the wait: keeps the compiler from reading the accumulator before it.
template <typename T, int kCols>
FX_DEVICE void arrived(AccTile<T, 16, kCols>& c) {
#pragma unroll
  for (int n = 0; n < kCols / 16; ++n)
#pragma unroll
    for (int i = 0; i < 8; ++i) asm volatile("" : "+f"(c.atom[0][n].reg[i])::"memory");
}

// Parts of the instruction's text. a<4> and da, db are its operands in registers and descriptors.
template <typename T>
struct TypeName {
  static constexpr const char text[] = "bf16";
};
template <>
struct TypeName<half_t> {
  static constexpr const char text[] = "f16";
};
struct SharedByRows {  // a [64, k] and b [n, k] in shared memory
  static constexpr const char text[] = "da, db, add, 1, 1, 0, 0";
};
struct SharedByRowsCols {  // a [64, k] and b [k, n] in shared memory
  static constexpr const char text[] = "da, db, add, 1, 1, 0, 1";
};
struct SharedByCols {  // a [k, 64] and b [k, n] in shared memory
  static constexpr const char text[] = "da, db, add, 1, 1, 1, 1";
};
struct RegistersByCols {  // a [64, k] in registers, b [k, n] in shared memory
  static constexpr const char text[] = "{a0, a1, a2, a3}, db, add, 1, 1, 1";
};

// The widths that are spelled out below; others are put together from them.
inline constexpr int kWidths[] = {256, 192, 128, 112, 96, 80, 64, 48, 32};
constexpr int widest(int n) {
  for (int width : kWidths)
    if (width <= n) return width;
  return 0;
}

// One instruction: d[64, kWidth] = a[64, 16] b[16, kWidth], added to d or not.
template <int kWidth, typename T, typename Operands>
FX_DEVICE void wgmma(float* d, typename MmaAtom<T>::A a, uint64_t b, int add) {
  if constexpr (kWidth == 32)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %16;\nmov.b32 a1, %17;\nmov.b32 a2, %18;\nmov.b32 a3, %19;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %20;\nsetp.ne.b32 add, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.%22.%22 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "%23;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 48)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %24;\nmov.b32 a1, %25;\nmov.b32 a2, %26;\nmov.b32 a3, %27;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %28;\nsetp.ne.b32 add, %29, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n48k16.f32.%30.%30 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23}, "
        "%31;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 64)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %32;\nmov.b32 a1, %33;\nmov.b32 a2, %34;\nmov.b32 a3, %35;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %36;\nsetp.ne.b32 add, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.%38.%38 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%39;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 80)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %40;\nmov.b32 a1, %41;\nmov.b32 a2, %42;\nmov.b32 a3, %43;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %44;\nsetp.ne.b32 add, %45, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n80k16.f32.%46.%46 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39}, "
        "%47;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 96)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %48;\nmov.b32 a1, %49;\nmov.b32 a2, %50;\nmov.b32 a3, %51;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %52;\nsetp.ne.b32 add, %53, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32.%54.%54 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "%55;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 112)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %56;\nmov.b32 a1, %57;\nmov.b32 a2, %58;\nmov.b32 a3, %59;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %60;\nsetp.ne.b32 add, %61, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.%62.%62 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55}, "
        "%63;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 128)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %64;\nmov.b32 a1, %65;\nmov.b32 a2, %66;\nmov.b32 a3, %67;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %68;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.%70.%70 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%71;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 192)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %96;\nmov.b32 a1, %97;\nmov.b32 a2, %98;\nmov.b32 a3, %99;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %100;\nsetp.ne.b32 add, %101, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32.%102.%102 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
        "%103;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
          "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
          "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
          "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
  else if constexpr (kWidth == 256)
    asm volatile(
        "{\n.reg .pred add;\n.reg .b32 a<4>;\n.reg .b64 da, db;\n"
        "mov.b32 a0, %128;\nmov.b32 a1, %129;\nmov.b32 a2, %130;\nmov.b32 a3, %131;\n"
        "mov.b64 da, {a0, a1};\nmov.b64 db, %132;\nsetp.ne.b32 add, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.%134.%134 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "
        "%111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
        "%127}, "
        "%135;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]),
          "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]),
          "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]),
          "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]),
          "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]),
          "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]),
          "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]),
          "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]),
          "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]),
          "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
        : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "l"(b), "r"(add),
          "C"(TypeName<T>::text), "C"(Operands::text));
}

// c[m, n] (+)= the product of 16 columns of a, for all columns of c; b_of(n0) is b from its n0-th row
// or column on.
template <typename Operands, int kFrom = 0, typename T, int kCols, typename B>
FX_DEVICE void wgmma_all(AccTile<T, 16, kCols>& c, typename MmaAtom<T>::A a, B b_of, int add) {
  if constexpr (kFrom < kCols) {
    constexpr int kWidth = widest(kCols - kFrom);
    static_assert(kWidth > 0, "spell this width out");
    wgmma<kWidth, T, Operands>(c.atom[0][kFrom / 16].reg, a, b_of(kFrom), add);
    wgmma_all<Operands, kFrom + kWidth>(c, a, b_of, add);
  }
}

// An operand that shared memory names.
template <typename T>
FX_DEVICE typename MmaAtom<T>::A named(uint64_t descriptor) {
  return {{static_cast<uint32_t>(descriptor), static_cast<uint32_t>(descriptor >> 32), 0, 0}};
}

// Starts c = a b^T, over kK columns: c[64, n], a[64, k] from row a_row on, b[n, k].
template <int kK, typename T, int kCols, int kTileRows, int kTileCols>
FX_DEVICE void start_abt(AccTile<T, 16, kCols>& c, SwizzledTile<T, kTileRows, kTileCols> a,
                         SwizzledTile<T, kCols, kTileCols> b, int a_row = 0) {
  const uint64_t a0 = a.descriptor() + a.step(a_row, 0), b0 = b.descriptor();
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    wgmma_all<SharedByRows>(
        c, named<T>(a0 + a.step(0, k)), [&](int n) { return b0 + b.step(n, k); }, k > 0);
  }
}

// Starts c = a^T b: c[64, n], a[k, 64] and b[k, n] from a_col and b_col on, multiples of 64.
template <typename T, int kCols, int kK, int kACols, int kBCols>
FX_DEVICE void start_atb(AccTile<T, 16, kCols>& c, SwizzledTile<T, kK, kACols> a, int a_col,
                         SwizzledTile<T, kK, kBCols> b, int b_col) {
  const uint64_t a0 = a.descriptor() + a.step(0, a_col), b0 = b.descriptor() + b.step(0, b_col);
#pragma unroll
  for (int k = 0; k < kK; k += 16)
    wgmma_all<SharedByCols>(
        c, named<T>(a0 + a.step(k, 0)), [&](int n) { return b0 + b.step(k, n); }, k > 0);
}

// Starts c += a b: c[64, n], a[64, k] from row a_row on, b[k, n].
template <typename T, int kCols, int kARows, int kK, int kTileCols>
FX_DEVICE void start_ab(AccTile<T, 16, kCols>& c, SwizzledTile<T, kARows, kK> a, int a_row,
                        SwizzledTile<T, kK, kTileCols> b) {
  const uint64_t a0 = a.descriptor() + a.step(a_row, 0), b0 = b.descriptor();
#pragma unroll
  for (int k = 0; k < kK; k += 16)
    wgmma_all<SharedByRowsCols>(
        c, named<T>(a0 + a.step(0, k)), [&](int n) { return b0 + b.step(k, n); }, 1);
}

// Starts c += a b: c[64, n], a[64, k] in registers, b[k, n].
template <typename T, int kCols, int kK, int kTileCols>
FX_DEVICE void start_ab(AccTile<T, 16, kCols>& c, const OperandTile<T, 16, kK>& a,
                        SwizzledTile<T, kK, kTileCols> b) {
  const uint64_t b0 = b.descriptor();
#pragma unroll
  for (int k = 0; k < kK; k += 16)
    wgmma_all<RegistersByCols>(c, a.get(0, k / 16), [&](int n) { return b0 + b.step(k, n); }, 1);
}

}  // namespace flash_ext::sm90
