#pragma once
#include <cstdint>

namespace simt {

// c += a b by one warp; a and b hold pairs of float16 (half) or bfloat16.
void mma_m16n8k16(float* c, const uint32_t* a, const uint32_t* b, bool half);

}  // namespace simt
