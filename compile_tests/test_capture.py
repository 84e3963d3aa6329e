"""capture_train_step where there is no GPU; tests/test_cuda.py has the rest."""

import pytest
import torch
from torch import nn

from torch_ademamix import AdEMAMix, capture_train_step


def test_needs_one_cuda_device():
    model = nn.Linear(3, 1)
    optimizer = AdEMAMix(model.parameters())
    with pytest.raises(ValueError, match="needs all parameters on one CUDA device"):
        capture_train_step(model, optimizer, lambda model, x: model(x).sum(), (torch.ones(2, 3),))
    assert not optimizer.state
