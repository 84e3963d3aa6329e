import sys

import pytest

from tests.helpers.config import KERNELS, native_built
from torch_ademamix.ops import compiled_reference

# The oracle runs operation by operation; test_compiled_reference.py compiles it.
compiled_reference.MIN_NUMEL = sys.maxsize


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "native" and not native_built():
        pytest.skip("built without native kernels")
    return request.param
