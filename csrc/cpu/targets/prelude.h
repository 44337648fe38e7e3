// Every header that a target needs from outside, included before its #pragma target: what they define
// must stay baseline code, because the linker keeps only one copy of an inline function.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../attn/params.h"
#include "../../attn/philox.h"
#include "../../attn/visible.h"
#include "../element.h"
#include "../kernels.h"
#include "../scratch.h"
#include "targets.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
