#pragma once
#include "../gpu_check.h"
#include "bwd.h"
#include "bwd_kernel.h"

namespace flash_ext {

template <BwdVariant kVariant>
void launch_bwd(const BwdArgs& args, const GpuFacts& gpu, void* stream) {
  using Config = BwdConfig<kVariant>;
  const auto kernel = attn_bwd_kernel<Config>;
  const int smem_bytes = Config::kTile.smem_bytes(kVariant, gpu.adds_async);
  if (smem_bytes > 48 * 1024) allow_shared_memory<attn_bwd_kernel<Config>>(smem_bytes);
  const int64_t blocks = args.groups * args.blocks_kv;
  FX_CHECK(blocks < int64_t{1} << 31, "k: too many rows for one call");
  kernel<<<static_cast<unsigned>(blocks), Config::kTile.warps() * gpu.warp_size, smem_bytes,
           static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

// Compiles the variants of this dtype and head_dim, and finds one of them.
template <DType kDType, int kHeadDim>
BwdLauncher find_bwd(BwdVariant want) {
  return want.general ? launch_bwd<BwdVariant{kDType, kHeadDim, true}>
                      : launch_bwd<BwdVariant{kDType, kHeadDim, false}>;
}

}  // namespace flash_ext
