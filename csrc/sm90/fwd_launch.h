#pragma once
#include <algorithm>

#include "../gpu_check.h"
#include "fwd.h"
#include "fwd_kernel.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {

template <typename Config>
void launch(const FwdPlan& plan, const GpuFacts&, void* stream) {
  constexpr int kSmemBytes = Shared<Config>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  const auto kernel = fwd_kernel<Config>;
  FX_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes));
  const AttnParams& p = plan.args.params;
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  FwdArgs args{plan.args, plan.taken};
  if (plan.taken)
    FX_CUDA_CHECK(cudaMemsetAsync(plan.taken, 0, sizeof(unsigned), static_cast<stream_t>(stream)));
  args.q_map = tensor_map(p.q, {batch, p.heads_q, plan.rows_q, p.head_dim}, 64);
  args.k_map = tensor_map(p.k, {batch, p.heads_kv, plan.rows_kv, p.head_dim}, Config::kBlockKV);
  args.v_map = tensor_map(p.v, {batch, p.heads_kv, plan.rows_kv, p.head_dim_v}, Config::kBlockKV);
  kernel<<<static_cast<unsigned>(plan.blocks), Config::kThreads, kSmemBytes,
           static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

}  // namespace flash_ext::sm90
