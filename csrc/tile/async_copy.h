// Copies from global to shared memory that run while the warp goes on.
#pragma once
#include "platform.h"
#if FX_AMD
#include "amd/async_copy.h"
#else
#include "nvidia/async_copy.h"
#endif
