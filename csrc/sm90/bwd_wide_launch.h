#pragma once
#include "../gpu_check.h"
#include "bwd.h"
#include "bwd_dkv_kernel.h"
#include "bwd_dq_kernel.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {

inline BwdArgs with_maps(const BwdPlan& plan, int rows, int keys) {
  const AttnBwdParams& p = plan.args.params;
  const int64_t batch = p.cu_seqlens_q ? 1 : p.batch;
  BwdArgs args{plan.args, static_cast<int>(p.heads_q / p.heads_kv), plan.seen};
  args.q_map = tensor_map(p.q, {batch, p.heads_q, p.rows_q, p.head_dim}, rows);
  args.grad_o_map = tensor_map(p.grad_o, {batch, p.heads_q, p.rows_q, p.head_dim_v}, rows);
  args.k_map = tensor_map(p.k, {batch, p.heads_kv, p.rows_kv, p.head_dim}, keys);
  args.v_map = tensor_map(p.v, {batch, p.heads_kv, p.rows_kv, p.head_dim_v}, keys);
  return args;
}

template <typename Config>
void launch_dkv(const BwdPlan& plan, void* stream) {
  constexpr int kSmemBytes = DkvShared<Config>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  allow_shared_memory<dkv_kernel<Config>>(kSmemBytes);
  const BwdArgs args = with_maps(plan, Config::kBlockQ, Config::kBlockKV);
  dkv_kernel<Config><<<static_cast<unsigned>(args.groups * args.blocks_kv), Config::kThreads,
                       kSmemBytes, static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

template <typename Config>
void launch_dq(const BwdPlan& plan, void* stream) {
  constexpr int kSmemBytes = DqShared<Config>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  allow_shared_memory<dq_kernel<Config>>(kSmemBytes);
  const BwdArgs args = with_maps(plan, 64, Config::kBlockKV);
  dq_kernel<Config><<<static_cast<unsigned>(args.groups * args.heads_of_group * args.blocks_q),
                      Config::kThreads, kSmemBytes, static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

template <DType kDType, int kHeadDim, Options kWith>
void launch_both(const BwdPlan& plan, void* stream) {
  const flash_ext::BwdArgs& args = plan.args;
  if (args.groups * args.blocks_kv > 0)
    launch_dkv<DkvConfig<kDType, kHeadDim, kWith>>(plan, stream);
  if (args.rows > 0) launch_dq<DqConfig<kDType, kHeadDim, kWith>>(plan, stream);
}

template <DType kDType, int kHeadDim>
void launch_wide(const BwdPlan& plan, void* stream) {
  using enum Options;
  switch (plan.options) {
    case none: return launch_both<kDType, kHeadDim, none>(plan, stream);
    case scores: return launch_both<kDType, kHeadDim, scores>(plan, stream);
    case dropout: return launch_both<kDType, kHeadDim, dropout>(plan, stream);
  }
}

}  // namespace flash_ext::sm90
