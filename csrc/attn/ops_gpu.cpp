// The GPU implementations of the ops. Registered only where GPU kernels are built.
#if defined(FLASH_EXT_WITH_CUDA) || defined(FLASH_EXT_WITH_ROCM)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <mutex>

#include "../checks.h"
#include "bwd.h"
#include "fwd.h"
#if defined(FLASH_EXT_WITH_CUDA)
#include "../sm90/bwd.h"
#include "../sm90/fwd.h"
#endif
#include "ops.h"

namespace flash_ext {
namespace {

// torch's current stream. The function is in the GPU part of torch, which this module does not link
// so that it also loads where torch has none; whoever has a GPU tensor has loaded it.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto get = [] {
    for (const char* library : {"libtorch_cuda.so", "libtorch_hip.so"})
      if (void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD))
        if (void* found = dlsym(handle, "aoti_torch_get_current_cuda_stream"))
          return reinterpret_cast<Function>(found);
    return Function{nullptr};
  }();
  void* stream = nullptr;
  FX_CHECK(get && get(device, &stream) == 0, "flash_ext: torch's current GPU stream is not found");
  return stream;
}

const GpuFacts& facts_of(int32_t device) {
  constexpr int kMostDevices = 64;
  static std::array<GpuFacts, kMostDevices> facts;
  static std::array<std::once_flag, kMostDevices> asked;
  FX_CHECK(device >= 0 && device < kMostDevices, "q: on device ", device, " of more than ",
           kMostDevices);
  std::call_once(asked[device], [&] { facts[device] = gpu_facts(device); });
  return facts[device];
}

// Finds room for what a plan needs besides its results, and starts it.
template <typename Plan, typename Launch>
void launch_plan(Plan plan, const Tensor& like, Launch launch) {
  Tensor scratch;
  if (const int64_t count = plan.scratch_floats()) {
    scratch = floats(like, count);
    plan.use_scratch(static_cast<float*>(scratch.data_ptr()));
  }
  launch(plan);
}

// Whether the kernels of csrc/sm90 are to run it. A gradient that they do not have is left to the
// portable ones, also where they were asked for.
bool runs_on_hopper(const FwdCall& call, const GpuFacts& gpu, Kernels kernels) {
  if (kernels == Kernels::portable) return false;
#if defined(FLASH_EXT_WITH_CUDA)
  const auto obstacle = sm90::obstacle(call.params, gpu);
  if (!obstacle) return kernels == Kernels::hopper || sm90::worthwhile(call.params);
  const std::string why = *obstacle;
#else
  const std::string why = "this is a build for AMD";
#endif
  FX_CHECK(kernels != Kernels::hopper, "backend: 'sm90' cannot run this call: ", why);
  return false;
}
bool runs_on_hopper(const BwdCall& call, const GpuFacts& gpu, Kernels kernels) {
#if defined(FLASH_EXT_WITH_CUDA)
  return kernels != Kernels::portable && !sm90::obstacle(call.params, gpu) &&
         (kernels == Kernels::hopper || sm90::worthwhile(call.params));
#else
  return false;
#endif
}

Pair run_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Packing* packing,
             bool out_bshd, const AttnOptions& options) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const FwdCall call = prepare_fwd(q, k, v, packing, out_bshd, options);
  const CurrentDevice current(device);
  const GpuFacts& gpu = facts_of(device);
  void* stream = current_stream(device);
  if (!runs_on_hopper(call, gpu, options.kernels))
    launch_plan(plan_fwd(call.params, gpu), call.result,
                [&](const auto& plan) { launch_fwd(plan, gpu, stream); });
#if defined(FLASH_EXT_WITH_CUDA)
  else
    launch_plan(sm90::plan_fwd(call.params, gpu), call.result,
                [&](const auto& plan) { sm90::launch_fwd(plan, stream); });
#endif
  return {call.result, call.lse};
}

Five run_bwd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q,
             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
             const Packing* packing, bool need_mask_grad, bool deterministic,
             const AttnOptions& options) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const BwdCall call =
      prepare_bwd(grad_out, grad_lse, q, k, v, out, lse, packing, need_mask_grad, options);
  const CurrentDevice current(device);
  const GpuFacts& gpu = facts_of(device);
  void* stream = current_stream(device);
  if (!runs_on_hopper(call, gpu, options.kernels))
    launch_plan(plan_bwd(call.params, gpu, deterministic), call.dq,
                [&](const auto& plan) { launch_bwd(plan, gpu, stream); });
#if defined(FLASH_EXT_WITH_CUDA)
  else
    launch_plan(sm90::plan_bwd(call.params, gpu, deterministic), call.dq,
                [&](const auto& plan) { sm90::launch_bwd(plan, stream); });
#endif
  return {call.dq, call.dk, call.dv, call.finished_dmask(options.attn_mask), call.dsinks};
}

using GpuOps = Ops<run_fwd, run_bwd>;

}  // namespace
}  // namespace flash_ext

STABLE_TORCH_LIBRARY_IMPL(flash_ext, CUDA, m) {
  m.impl("attn_fwd", TORCH_BOX(&flash_ext::GpuOps::attn_fwd));
  m.impl("attn_plain", TORCH_BOX(&flash_ext::GpuOps::attn_plain));
  m.impl("attn_plain_bwd", TORCH_BOX(&flash_ext::GpuOps::attn_plain_bwd));
  m.impl("attn_bwd", TORCH_BOX(&flash_ext::GpuOps::attn_bwd));
  m.impl("attn_varlen_fwd", TORCH_BOX(&flash_ext::GpuOps::attn_varlen_fwd));
  m.impl("attn_varlen_bwd", TORCH_BOX(&flash_ext::GpuOps::attn_varlen_bwd));
}
#endif
