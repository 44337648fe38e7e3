#include "../vendor.h"

#include "bwd_wide_launch.h"

namespace flash_ext::sm90 { template void launch_wide<DType::f16, 256>(const BwdPlan&, void*); }
