#include "../vendor.h"

#include "bwd_launch.h"

namespace flash_ext::sm90 { template void launch_main<DType::bf16, 80>(const BwdPlan&, void*); }
