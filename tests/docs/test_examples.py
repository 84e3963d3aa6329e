"""The examples in the docstrings of all public modules."""

import doctest
import pkgutil
from importlib import import_module

import pytest

import torch_ademamix

MODULES = [
    module.name
    for module in pkgutil.walk_packages(torch_ademamix.__path__, "torch_ademamix.")
    if "._" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert doctest.testmod(import_module(name)).failed == 0


@pytest.mark.parametrize("name", torch_ademamix.__all__)
def test_public_names_have_docstrings(name):
    assert getattr(torch_ademamix, name).__doc__
