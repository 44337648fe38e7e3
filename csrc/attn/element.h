// The GPU's type for a dtype.
#pragma once
#include <type_traits>

#include "params.h"

namespace flash_ext {

template <DType kDType>
using Element = std::conditional_t<kDType == DType::f16, half_t,
                                   std::conditional_t<kDType == DType::bf16, bf16_t, float>>;

}  // namespace flash_ext
