import os

import pytest
import torch
from config import KERNELS, native_built

os.environ["HF_HUB_OFFLINE"] = "1"  # read by transformers when it is imported: nothing is looked up online

torch.set_num_threads(1)  # tensors this small: more threads would only wait for one another


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KERNELS)
def kernel(request):
    if request.param == "native" and not native_built():
        pytest.skip("built without native kernels")
    return request.param
