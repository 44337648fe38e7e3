// One 16x16x16 matrix product a warp, and which lane holds what of it.
#pragma once
#include "platform.h"
#if FX_AMD
#include "amd/mma_atom.h"
#else
#include "nvidia/mma_atom.h"
#endif
#include "mma_atom_f32.h"
