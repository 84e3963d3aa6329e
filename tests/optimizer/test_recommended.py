"""The settings for a run of a given length."""

import numpy
import pytest
import torch

from torch_ademamix import AdEMAMix, AdEMAMix8bit, recommended


@pytest.mark.parametrize(
    ("steps", "beta3", "warm_up"),
    [
        (1, 0.999, 1),
        (3_000, 0.999, 3_000),
        (300_000, 0.999, 300_000),
        (300_001, 0.9999, 100_000),
        (2_600_000, 0.9999, 100_000),
    ],
)
def test_settings(steps, beta3, warm_up):
    settings = recommended(steps)
    assert settings == {"betas": (0.9, 0.999, beta3), "alpha": 8.0, "t_alpha": warm_up, "t_beta3": warm_up}
    for cls in (AdEMAMix, AdEMAMix8bit):
        optimizer = cls([torch.ones(2)], lr=1e-2, weight_decay=0.1, **settings)
        assert settings.items() <= optimizer.param_groups[0].items()


def test_numbers_of_other_libraries():
    assert type(recommended(numpy.int64(5))["t_alpha"]) is int


@pytest.mark.parametrize("steps", [1e4, "100", None, True])
def test_steps_of_another_type(steps):
    with pytest.raises(TypeError, match=r"steps is .*, but must be an int: the optimizer steps of the whole run"):
        recommended(steps)


@pytest.mark.parametrize("steps", [0, -1])
def test_too_few_steps(steps):
    with pytest.raises(ValueError, match=rf"steps is {steps}, but must be at least 1"):
        recommended(steps)
