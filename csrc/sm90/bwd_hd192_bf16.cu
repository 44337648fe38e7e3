#include "../vendor.h"

#include "bwd_wide_launch.h"

namespace flash_ext::sm90 { template void launch_wide<DType::bf16, 192>(const BwdPlan&, void*); }
