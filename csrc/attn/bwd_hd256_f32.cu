#include "../vendor.h"

#include "bwd_launch.h"

namespace flash_ext { template BwdLauncher find_bwd<DType::f32, 256>(BwdVariant); }
