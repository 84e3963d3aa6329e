// LibTorch's stable ABI, for files that use torch: one build works with every torch from 2.11 on. (ATen/cpu/vec can't
// be included together with it, so the SIMD kernels are in separate files.)
#pragma once

#ifdef TORCH_FEATURE_VERSION
#error "torch_stable.h must come before torch's own headers, which would take up what is newer than torch 2.11"
#endif
#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace ademamix {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<Tensor>;

}  // namespace ademamix
