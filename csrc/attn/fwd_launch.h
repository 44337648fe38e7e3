#pragma once
#include "../gpu_check.h"
#include "fwd.h"
#include "fwd_kernel.h"

namespace flash_ext {

template <FwdVariant kVariant>
void launch_fwd(const FwdArgs& args, const GpuFacts& gpu, void* stream) {
  using Config = FwdConfig<kVariant>;
  constexpr int kSmemBytes = Config::kTile.smem_bytes(kVariant);
  const auto kernel = attn_fwd_kernel<Config>;
  if constexpr (kSmemBytes > 48 * 1024) allow_shared_memory<attn_fwd_kernel<Config>>(kSmemBytes);
  const int64_t blocks = args.heads * args.blocks_q * args.splits;
  FX_CHECK(blocks < int64_t{1} << 31, "q: too many rows for one call");
  kernel<<<static_cast<unsigned>(blocks), Config::kTile.warps * gpu.warp_size, kSmemBytes,
           static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

// Compiles the variants of this dtype and head_dim, and finds one of them.
template <DType kDType, int kHeadDim>
FwdLauncher find_fwd(FwdVariant want) {
  constexpr auto few = FwdRows::few, some = FwdRows::some, many = FwdRows::many;
  if (want.rows == few)
    return want.general ? launch_fwd<FwdVariant{kDType, kHeadDim, few, true}>
                        : launch_fwd<FwdVariant{kDType, kHeadDim, few, false}>;
  if constexpr (FwdVariant{kDType, kHeadDim, some, false}.compiled())
    if (want.rows == some) return launch_fwd<FwdVariant{kDType, kHeadDim, some, false}>;
  return want.general ? launch_fwd<FwdVariant{kDType, kHeadDim, many, true}>
                      : launch_fwd<FwdVariant{kDType, kHeadDim, many, false}>;
}

}  // namespace flash_ext
