import pytest
from config import KERNELS, native_built


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "native" and not native_built():
        pytest.skip("built without native kernels")
    return request.param
