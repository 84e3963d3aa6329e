// Comes before the host code of ops/cuda, which is unchanged but for its ops: they become the CPU's, in a namespace of
// their own.
#pragma once

#include "../../ops/torch_stable.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(cuda_on_host, CPU, m, C10_UID)
