"""Conversions of state dicts: of other implementations to AdEMAMix's, and of AdEMAMix's to some of them.

Each function takes what an optimizer's ``state_dict()`` returned, from memory or from a file, and returns what the
other's ``load_state_dict`` takes. No other package needs to be installed. The argument isn't changed, and the result
shares no memory with it; tensors stay on their devices. Keys of ``state`` are passed through, so they may be parameter
names or indices. Tensors must be whole: gather the state of sharded parameters first.

Group entries that no table here names, such as an LR scheduler's ``initial_lr``, are passed through too. Options of
AdEMAMix that the source doesn't have, such as ``seed``, are left out. The optimizer that loads the result keeps its
own, and it decides how state is stored (``optim_bits`` and so on).
"""

from torch_ademamix.checkpoint.adamw import from_adamw
from torch_ademamix.checkpoint.adana import from_adana, to_adana
from torch_ademamix.checkpoint.apertus import from_apertus, to_apertus
from torch_ademamix.checkpoint.apple import from_apple
from torch_ademamix.checkpoint.bitsandbytes import from_bitsandbytes, to_bitsandbytes

__all__ = [
    "from_adamw",
    "from_adana",
    "from_apertus",
    "from_apple",
    "from_bitsandbytes",
    "to_adana",
    "to_apertus",
    "to_bitsandbytes",
]
