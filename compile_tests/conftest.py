import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import ReinplaceCounters


@pytest.fixture(autouse=True)
def _compile_afresh():
    torch._dynamo.reset()
    ReinplaceCounters.clear()
    # Caches would hide the generated code.
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def counter(request):
    """A backend that counts the graphs compiled with it."""
    return CompileCounterWithBackend(request.param)
