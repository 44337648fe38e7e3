#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "targets/targets.h"

namespace flash_ext::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*usable)();
  const Kernels& (*kernels)(DType);
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

const Kernels& avx512_bf16_kernels(DType dtype) {
  return dtype == DType::bf16 ? avx512_bf16::bf16_kernels() : avx512::kernels(dtype);
}
#endif

constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_kernels},
    {"avx512", has_avx512, avx512::kernels},
    {"avx2", has_avx2, avx2::kernels},
#endif
    {"generic", [] { return true; }, generic::kernels},
};

const Isa& find(const std::string& name) {
  std::string usable;
  for (const Isa& isa : kIsas) {
    if (!isa.usable()) continue;
    if (name == isa.name) return isa;
    usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("FLASH_EXT_CPU_ISA: expected one of " + usable + ", got '" + name +
                              "'");
}

const Isa& best() {
  for (const Isa& isa : kIsas)
    if (isa.usable()) return isa;
  return kIsas[std::size(kIsas) - 1];
}

std::atomic<const Isa*> current{nullptr};

const Isa& current_or_first() {
  const Isa* isa = current.load(std::memory_order_acquire);
  if (!isa) {
    const char* wanted = std::getenv("FLASH_EXT_CPU_ISA");
    isa = wanted && *wanted ? &find(wanted) : &best();
    current.store(isa, std::memory_order_release);
  }
  return *isa;
}

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas)
    if (isa.usable()) names.push_back(isa.name);
  return names;
}
std::string current_isa() { return current_or_first().name; }
void set_isa(const std::string& name) { current.store(&find(name), std::memory_order_release); }
const Kernels& kernels_for(DType dtype) { return current_or_first().kernels(dtype); }

}  // namespace flash_ext::cpu
