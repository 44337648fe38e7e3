// The kernels of one target for one storage type.
#pragma once
#include "bwd.h"
#include "fwd_few_rows.h"
#include "kernels.h"

namespace flash_ext::cpu::FX_ISA {

template <typename T, typename Math>
inline constexpr Kernels kKernels = {
    kFewRows,
    kBlockRows,
    BwdTile<T, Math>::kRows,
    BwdTile<T, Math>::kKeys,
    fwd<T, Math>,
    fwd_few_rows<T, Math>,
    fwd_combine<T, Math>,
    bwd<T, Math>,
    bwd_mask<T, Math>,
    bwd_sink<T, Math>,
};

inline const Kernels& plain_kernels(DType dtype) {
  switch (dtype) {
    case DType::f64: return kKernels<double, PlainMath<double>>;
    case DType::f16: return kKernels<half_t, PlainMath<float>>;
    case DType::bf16: return kKernels<bf16_t, PlainMath<float>>;
    default: return kKernels<float, PlainMath<float>>;
  }
}

}  // namespace flash_ext::cpu::FX_ISA
