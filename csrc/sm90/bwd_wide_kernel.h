// The backward of wide heads on Hopper: thread blocks that stay compute dk and dv of all keys, and then
// dq of all rows, which needs nothing of them.
#pragma once
#include "bwd_dkv_kernel.h"
#include "bwd_dq_kernel.h"

namespace flash_ext::sm90 {

// Both parts use the same places for their tiles, one after the other, and barriers of their own.
template <typename Dkv, typename Dq>
struct WideShared {
  struct Rest {
    typename DkvShared<Dkv>::Rest dkv;
    typename DqShared<Dq>::Rest dq;
    Mbarrier dkv_done;
  };
  static constexpr int kTiles = std::max(DkvShared<Dkv>::kBytes, DqShared<Dq>::kBytes);
  static constexpr int kBytes = kTiles + int{sizeof(Rest)};
  unsigned char* base;

  FX_DEVICE Rest& rest() const { return *reinterpret_cast<Rest*>(base + kTiles); }
  FX_DEVICE DkvShared<Dkv> dkv() const { return {base, rest().dkv}; }
  FX_DEVICE DqShared<Dq> dq() const { return {base, rest().dq}; }
  FX_DEVICE void init() const {
    dkv().init(), dq().init();
    rest().dkv_done.init(2 * kWarpgroup / kWarpSize);
    Mbarrier::publish_init();
  }
};

template <typename Dkv, typename Dq>
__global__ void __launch_bounds__(3 * kWarpgroup, 1)
    bwd_wide_kernel(const __grid_constant__ WideBwdArgs args) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char smem[];
  const WideShared<Dkv, Dq> shared{smem};
  if (threadIdx.x == 0) {
    prefetch(args.q_map), prefetch(args.k_map), prefetch(args.v_map), prefetch(args.grad_o_map);
    prefetch(args.dq_k_map), prefetch(args.dq_v_map);
    shared.init();
  }
  __syncthreads();  // the barriers are set up
  Mbarrier& dkv_done = shared.rest().dkv_done;
  if (const int warpgroup = warpgroup_id(); warpgroup == 0) {
    give_registers_away<kWideLoaderRegisters>();
    const int warp = uniform(static_cast<int>(warp_id()));
    if (warp == 0 && lane_id() == 0) {
      load_for_dkv<Dkv>(args, shared.dkv());
      dkv_done.wait(0);  // the tiles' places are free
      load_for_dq<Dq>(args, shared.dq());
    }
    if (warp == 1) load_stats_for_dkv<Dkv>(args, shared.dkv());
    if (warp == 2 && lane_id() == 0) {
      const int groups = static_cast<int>(args.groups);
      shared.rest().dkv.tasks.take(args.turns, groups * args.blocks_kv,
                                   [&](int n) { return dkv_task<Dkv>(args, n); });
      shared.rest().dq.tasks.take(args.turns + 1, groups * args.heads_of_group * args.blocks_q,
                                  [&](int n) { return dq_task<Dq>(args, n); });
    }
  } else {
    take_registers<kWideRegisters>();
    if (warpgroup == 1) DkvCompute<Dkv, false>(args, shared.dkv()).all_tasks();
    else DkvCompute<Dkv, true>(args, shared.dkv()).all_tasks();
    ptx::fence_proxy_async();  // where weights were the copy engine will write
    __syncwarp();
    if (lane_id() == 0) dkv_done.arrive();
    DqCompute<Dq>(args, shared.dq(), warpgroup - 1).all_tasks();
  }
#endif
}

}  // namespace flash_ext::sm90
