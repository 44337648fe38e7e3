#pragma once
#include "../gpu_check.h"
#include "bwd.h"
#include "bwd_kernel.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {

template <typename Config>
void launch_config(const BwdPlan& plan, void* stream) {
  constexpr int kSmemBytes = BwdShared<Config>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  const auto kernel = bwd_kernel<Config>;
  allow_shared_memory<bwd_kernel<Config>>(kSmemBytes);
  const AttnBwdParams& p = plan.args.params;
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  BwdArgs args{plan.args, static_cast<int>(p.heads_q / p.heads_kv), plan.seen};
  args.q_map = tensor_map(p.q, {batch, p.heads_q, p.rows_q, p.head_dim}, Config::kBlockQ);
  args.grad_o_map =
      tensor_map(p.grad_o, {batch, p.heads_q, p.rows_q, p.head_dim_v}, Config::kBlockQ);
  args.k_map = tensor_map(p.k, {batch, p.heads_kv, p.rows_kv, p.head_dim}, Config::kBlockKV);
  args.v_map = tensor_map(p.v, {batch, p.heads_kv, p.rows_kv, p.head_dim_v}, Config::kBlockKV);
  kernel<<<static_cast<unsigned>(args.groups * args.blocks_kv), Config::kThreads, kSmemBytes,
           static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

template <DType kDType, int kHeadDim>
void launch_main(const BwdPlan& plan, void* stream) {
  using enum Options;
  switch (plan.options) {
    case none: return launch_config<BwdConfig<kDType, kHeadDim>>(plan, stream);
    case scores: return launch_config<BwdConfig<kDType, kHeadDim, scores>>(plan, stream);
    case dropout: return launch_config<BwdConfig<kDType, kHeadDim, dropout>>(plan, stream);
  }
}

}  // namespace flash_ext::sm90
