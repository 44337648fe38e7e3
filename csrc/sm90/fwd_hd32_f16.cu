#include "../vendor.h"

#include "fwd_launch.h"

namespace flash_ext::sm90 { template void launch<DType::f16, 32>(const FwdPlan&, void*); }
