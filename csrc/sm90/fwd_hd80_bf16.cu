#include "../vendor.h"

#include "fwd_launch.h"

namespace flash_ext::sm90 { template void launch<DType::bf16, 80>(const FwdPlan&, void*); }
