"""AdEMAMix for PyTorch, made for torch.compile and CUDA graphs."""

from torch_ademamix import checkpoint
from torch_ademamix.functional import ademamix
from torch_ademamix.optimizer import AdEMAMix
from torch_ademamix.recommended import recommended
from torch_ademamix.reference import ReferenceAdEMAMix
from torch_ademamix.training import capture_train_step, compile_train_step, release_gradients
from torch_ademamix.variants import (
    ADANA,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)

__all__ = [
    "ADANA",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "ReferenceAdEMAMix",
    "ademamix",
    "capture_train_step",
    "checkpoint",
    "compile_train_step",
    "recommended",
    "release_gradients",
]

__version__ = "0.3.0"
