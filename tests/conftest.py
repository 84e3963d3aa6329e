import pytest
import torch
from config import KERNELS, native_built

torch.set_num_threads(1)  # tensors this small: more threads would only wait for one another


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "native" and not native_built():
        pytest.skip("built without native kernels")
    return request.param
