#include "../vendor.h"

#include "fwd_launch.h"

namespace flash_ext { template FwdLauncher find_fwd<DType::f16, 96>(FwdVariant); }
