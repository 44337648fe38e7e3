#pragma once
#include <algorithm>

#include "../gpu_check.h"
#include "bwd.h"
#include "bwd_wide_kernel.h"
#include "tensor_map.h"

namespace flash_ext::sm90 {

template <typename Dkv, typename Dq>
void launch_wide_config(const BwdPlan& plan, void* stream) {
  constexpr int kSmemBytes = WideShared<Dkv, Dq>::kBytes;
  static_assert(kSmemBytes <= 227 * 1024);
  const auto kernel = bwd_wide_kernel<Dkv, Dq>;
  allow_shared_memory<bwd_wide_kernel<Dkv, Dq>>(kSmemBytes);
  const AttnBwdParams& p = plan.args.params;
  const Extent rows{p.cu_seqlens_q ? 1 : p.batch, p.heads_q, p.rows_q},
      keys{rows.batch, p.heads_kv, p.rows_kv};
  const auto map = [&](const TensorView& tensor, Extent extent, int64_t cols, int box_rows) {
    return tensor_map(tensor, {extent.batch, extent.heads, extent.rows, cols}, box_rows);
  };
  WideBwdArgs args{{plan.args, static_cast<int>(p.heads_q / p.heads_kv)}};
  args.q_map = map(p.q, rows, p.head_dim, 64);
  args.grad_o_map = map(p.grad_o, rows, p.head_dim_v, 64);
  args.k_map = map(p.k, keys, p.head_dim, Dkv::kBlockKV);
  args.v_map = map(p.v, keys, p.head_dim_v, Dkv::kBlockKV);
  args.dq_k_map = map(p.k, keys, p.head_dim, Dq::kBlockKV);
  args.dq_v_map = map(p.v, keys, p.head_dim_v, Dq::kBlockKV);
  const int64_t tasks = args.groups * std::max(args.blocks_kv, args.heads_of_group * args.blocks_q);
  kernel<<<static_cast<unsigned>(std::min<int64_t>(tasks, plan.multiprocessors)), Dkv::kThreads,
           kSmemBytes, static_cast<stream_t>(stream)>>>(args);
  FX_CUDA_CHECK(cudaGetLastError());
}

template <DType kDType, int kHeadDim>
void launch_wide(const BwdPlan& plan, void* stream) {
  launch_wide_config<DkvConfig<kDType, kHeadDim>, DqConfig<kDType, kHeadDim>>(plan, stream);
}

}  // namespace flash_ext::sm90
