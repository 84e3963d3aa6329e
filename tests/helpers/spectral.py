"""A model with complex parameters, and its twin with real ones of shape [..., 2]."""

import copy
from functools import partial

import torch
from torch import nn

from tests.helpers.config import assert_identical


class Spectral(nn.Module):
    """Complex and real parameters of several shapes, strides and precisions."""

    def __init__(self):
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.matrix = nn.Parameter(draw(5, 4, dtype=torch.complex64).t())
        self.strided = nn.Parameter(draw(3, 6, dtype=torch.complex128)[:, ::2])
        self.scalar = nn.Parameter(draw((), dtype=torch.complex64))
        self.bias = nn.Parameter(draw(7))

    def as_reals(self):
        twin = copy.deepcopy(self)
        for name, p in self.named_parameters():
            if p.is_complex():
                twin.register_parameter(name, nn.Parameter(torch.view_as_real(p.detach()).clone()))
        return twin

    def forward(self, x):
        parameters = self.matrix, self.strided, self.scalar
        matrix, strided, scalar = (p if p.is_complex() else torch.view_as_complex(p) for p in parameters)
        y = (x + 1j) @ matrix.t() * scalar
        return y.abs().square().mean() + (strided.conj() * 1j).real.exp().mean() + self.bias.square().sum()


def loss_fn(model, x):
    return model(x)


def inputs(i):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(i))


def as_reals(tensor):
    return torch.view_as_real(tensor).contiguous() if tensor.is_complex() else tensor


def assert_same_training(model, optimizer, twin, twin_optimizer):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_identical(as_reals(p.detach()), q.detach(), name)
        state = {entry: as_reals(value) for entry, value in optimizer.state[p].items()}
        assert_identical(state, dict(twin_optimizer.state[q]), name)
