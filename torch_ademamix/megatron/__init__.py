"""AdEMAMix in Megatron-Core: `use_ademamix`, before Megatron makes its optimizer."""

from torch_ademamix.megatron.integration import use_ademamix

__all__ = ["use_ademamix"]
