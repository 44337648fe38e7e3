#include "prelude.h"
#define FX_ISA generic
#include "../simd/generic.h"

#include "../table.h"

const flash_ext::cpu::Kernels& flash_ext::cpu::generic::kernels(DType dtype) {
  return plain_kernels(dtype);
}
