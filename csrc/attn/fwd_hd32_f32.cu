#include "../vendor.h"

#include "fwd_launch.h"

namespace flash_ext { template FwdLauncher find_fwd<DType::f32, 32>(FwdVariant); }
