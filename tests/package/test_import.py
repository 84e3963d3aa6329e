"""What importing the package, and a first step, import from torch: Dynamo takes longer than torch itself."""

import subprocess
import sys

IMPORT = """
import sys, torch
before = set(sys.modules)
import torch_ademamix
"""
STEP = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(4096))
weight.grad = torch.ones(4096)
torch.optim.AdamW([weight]).step()
before = set(sys.modules)
import torch_ademamix
torch_ademamix.AdEMAMix([weight], optim_bits=8).step()
"""


def imported(script: str) -> set[str]:
    """The modules that the script imports after it has set `before`, without the package's own."""
    command = [sys.executable, "-c", f"{script}\nprint(*sorted(set(sys.modules) - before))"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert "torch_ademamix" in names
    return {name for name in names if not name.startswith("torch_ademamix")}


def test_import_leaves_out_what_compiles_and_shards():
    names = imported(IMPORT)
    assert not names & {"torch._dynamo", "torch._inductor", "torch._functorch", "torch.distributed.tensor", "sympy"}


def test_first_step_imports_no_more_than_adamws():
    assert not {name for name in imported(STEP) if name.startswith(("torch.", "sympy"))}
