"""The step on CUDA tensors, traced without a GPU: what a CUDA build of torch shows anywhere; `make cuda-load-check`."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_ademamix
from tests.helpers.graphs import describe
from tests.helpers.kernels import compile_kernels, is_typical, kernels
from torch_ademamix.ops import cuda
from torch_ademamix.state import paging

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")

CLASSES = ("AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit")
OPS = (
    "_ademamix_step_",
    "_ademamix_step_.tensor_hyperparameters",
    "_ademamix_blockwise_step_",
    "_ademamix_blockwise_step_.tensor_hyperparameters",
    "quantize_blockwise",
    "dequantize_blockwise",
    "paged_empty",
    "page_out",
)


def graph_of(name: str, device: str) -> str:
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(shape, device=device)) for shape in ((500, 400), (400,), (70, 60))]
        optimizer = getattr(torch_ademamix, name)(params, lr=torch.empty((), device=device), t_alpha=9, t_beta3=9)
        optimizer.init_state()
        for p in params:
            p.grad = torch.empty_like(p)
        backend = EagerAndRecordGraphs()
        torch.compile(optimizer.step, fullgraph=True, backend=backend)()
    (module,) = backend.graphs
    return describe(module.graph)


def test_kernels_compile(tmp_path: Path) -> None:
    """By the NVRTC of this torch; tests/cuda/test_cuda_build.py does it by others, for every architecture."""
    every = os.environ.get("ALL_VARIANTS") == "1"
    wanted = [name for name in kernels() if every or is_typical(name)]
    assert len(compile_kernels(wanted, cuda.find_nvrtc(), 90, tmp_path)) == len(wanted)


def test_cuda_kernels_are_registered() -> None:
    assert Path(torch_ademamix.__file__).with_name("_cuda.so").is_file()
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"torch_ademamix::{op}", "CUDA"), op


@pytest.mark.parametrize("name", CLASSES)
def test_the_graph_is_the_cpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "MIN_PAGED_SIZE", 1)  # else small parameters have arenas of their own
    on_cuda = graph_of(name, "cuda")
    torch._dynamo.reset()
    assert on_cuda.replace("cuda:0", "cpu").replace("type='cuda', index=0", "type='cpu'") == graph_of(name, "cpu")
    assert on_cuda.count("step_.default") == (2 if name.endswith("8bit") else 1)  # one op per kind of state
