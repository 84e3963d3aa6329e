import sys

import pytest
from config import KERNELS, native_built

from torch_ademamix import fused

fused.MIN_NUMEL = sys.maxsize  # the reference kernels are asked plain, as the oracle; test_fused.py compiles them


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "native" and not native_built():
        pytest.skip("built without native kernels")
    return request.param
