#pragma once
#include "../gpu_check.h"
#include "fwd.h"
#include "fwd_kernel.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {

template <typename Config>
void launch_config(const FwdPlan& plan, void* stream) {
  constexpr int kSmemBytes = Shared<Config>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  const auto kernel = fwd_kernel<Config>;
  allow_shared_memory<fwd_kernel<Config>>(kSmemBytes);
  const AttnParams& p = plan.args.params;
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  FwdArgs args{plan.args, plan.taken, plan.turns};
  args.q_map = tensor_map(p.q, {batch, p.heads_q, p.rows_q, p.head_dim}, 64);
  args.k_map = tensor_map(p.k, {batch, p.heads_kv, p.rows_kv, p.head_dim}, Config::kBlockKV);
  args.v_map = tensor_map(p.v, {batch, p.heads_kv, p.rows_kv, p.head_dim_v}, Config::kBlockKV);
  const auto cuda_stream = static_cast<stream_t>(stream);
  if (plan.taken) FX_CUDA_CHECK(cudaMemsetAsync(plan.taken, 0, sizeof *plan.taken, cuda_stream));
  kernel<<<static_cast<unsigned>(plan.thread_blocks), Config::kThreads, kSmemBytes, cuda_stream>>>(
      args);
  FX_CUDA_CHECK(cudaGetLastError());
}

template <DType kDType, int kHeadDim>
void launch(const FwdPlan& plan, void* stream) {
  using enum Options;
  switch (plan.options) {
    case none:
      if constexpr (constexpr FwdTile kEven = fwd_tile(kHeadDim, none, true);
                    kEven != fwd_tile(kHeadDim, none, false))
        if (plan.even) return launch_config<FwdConfig<kDType, kHeadDim, none, kEven>>(plan, stream);
      return launch_config<FwdConfig<kDType, kHeadDim>>(plan, stream);
    case scores: return launch_config<FwdConfig<kDType, kHeadDim, scores>>(plan, stream);
    case dropout: return launch_config<FwdConfig<kDType, kHeadDim, dropout>>(plan, stream);
  }
}

}  // namespace flash_ext::sm90
