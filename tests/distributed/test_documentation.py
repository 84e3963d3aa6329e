"""The examples of docs/distributed.md run as they stand, in one process and in two."""

import os
import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.distributed

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def run_examples(folder):
    before = Path.cwd()
    os.chdir(folder)
    names = {}
    try:
        for block in re.findall("```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(block, names)
    finally:
        os.chdir(before)
    states = names["optimizer"].state
    assert {int(state["step"]) for state in states.values()} == {3}
    assert {state["exp_avg_slow"].dtype for p, state in states.items() if p.dim() > 1} == {torch.int16}


@pytest.mark.nightly
@pytest.mark.parametrize("world_size", [1, 2])
def test_examples(workers, tmp_path, world_size):
    workers.run(world_size, run_examples, tmp_path)
