#include "../vendor.h"

#include <array>

#include "../gpu_check.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {
namespace {

// The driver is found at run time: a module that is linked to it would not load without a GPU.
auto encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  FX_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                 cudaEnableDefault, &result));
#else
  FX_CUDA_CHECK(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
  FX_CHECK(found, "flash_ext on the GPU: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

CUtensorMap encoded(const TensorView& tensor, Extent extent, int box_rows) {
  static const auto encode = encoder();
  const auto bytes = [](int64_t count, int64_t stride) -> cuuint64_t {
    return count > 1 ? 2 * stride : 16;  // that of a single one may be anything
  };
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[] = {size(extent.cols), size(extent.rows), size(extent.heads),
                              size(extent.batch)};
  const cuuint64_t strides[] = {bytes(extent.rows, tensor.seq_stride),
                                bytes(extent.heads, tensor.head_stride),
                                bytes(extent.batch, tensor.batch_stride)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, tensor.data, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FX_CHECK(status == CUDA_SUCCESS, "flash_ext on the GPU: cuTensorMapEncodeTiled: error ", status);
  return map;
}

}  // namespace

bool can_be_copied(const TensorView& t, Extent extent) {
  const auto fits = [](int64_t count, int64_t stride) {
    constexpr int64_t kMost = int64_t{1} << 40;  // bytes
    return count < 2 || (stride > 0 && stride % 8 == 0 && 2 * stride < kMost);
  };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && fits(extent.batch, t.batch_stride) &&
         fits(extent.heads, t.head_stride) && fits(extent.rows, t.seq_stride);
}

// Calls come again with tensors at the same places, above all in inference: the latest maps are kept.
CUtensorMap tensor_map(const TensorView& tensor, Extent extent, int box_rows) {
  struct Kept {
    TensorView tensor;
    Extent extent{};
    int box_rows = 0;
    CUtensorMap map;
  };
  constexpr size_t kKept = 64;
  thread_local std::array<Kept, kKept> kept;
  const size_t address = reinterpret_cast<size_t>(tensor.data);
  Kept& place = kept[(address / 512 ^ address / 512 / kKept ^ box_rows) % kKept];
  if (place.tensor != tensor || place.extent != extent || place.box_rows != box_rows)
    place = {tensor, extent, box_rows, encoded(tensor, extent, box_rows)};
  return place.map;
}

}  // namespace flash_ext::sm90
