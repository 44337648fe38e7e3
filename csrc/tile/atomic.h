#pragma once
#include "platform.h"
#if FX_AMD
#include "amd/atomic.h"
#else
#include "nvidia/atomic.h"
#endif
