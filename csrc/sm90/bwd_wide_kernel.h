// The backward of wide heads on Hopper: thread blocks that stay compute dk and dv of all keys, and then
// dq of all rows, which needs nothing of them.
#pragma once
#include "bwd_dkv_kernel.h"
#include "bwd_dq_kernel.h"

namespace flash_ext::sm90 {

template <typename Dkv, typename Dq>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    bwd_wide_kernel(const __grid_constant__ BwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const DkvShared<Dkv> dkv{smem};
  const DqShared<Dq> dq{smem};
  if (threadIdx.x == 0) {
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map), prefetch(args.grad_o_map);
    dkv.init();
  }
  __syncthreads();  // the barriers are set up
  // Between the two parts, which lay out shared memory anew.
  const auto begin_dq = [&] {
    __syncwarp();
    barrier_wait(0, 3 * kWarpgroup);  // nobody uses the places of dk and dv any more
    if (threadIdx.x == 0) dq.init();
    __syncwarp();
    barrier_wait(0, 3 * kWarpgroup);  // those of dq are set up
  };
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<kWideLoaderRegisters>();
    const int warp = uniform(static_cast<int>(warp_id()));
    if (warp == 0 && lane_id() == 0) load_for_dkv<Dkv>(args, dkv);
    if (warp == 1) load_stats_for_dkv<Dkv>(args, dkv);
    if (warp == 2 && lane_id() == 0)
      dkv.rest().tasks.take(args.turns, static_cast<int>(args.groups) * args.blocks_kv,
                            [&](int n) { return dkv_task<Dkv>(args, n); });
    begin_dq();
    if (warp == 0 && lane_id() == 0) load_for_dq<Dq>(args, dq);
    if (warp == 2 && lane_id() == 0)
      dq.rest().tasks.take(args.turns + 1,
                           static_cast<int>(args.groups) * args.heads_of_group * args.blocks_q,
                           [&](int n) { return dq_task<Dq>(args, n); });
  } else {
    take_registers<kWideRegisters>();
    if (warpgroup == 1) DkvCompute<Dkv, false>(args, dkv).all_tasks();
    else DkvCompute<Dkv, true>(args, dkv).all_tasks();
    begin_dq();
    DqCompute<Dq>(args, dq, warpgroup - 1).all_tasks();
  }
#endif
}

}  // namespace flash_ext::sm90
