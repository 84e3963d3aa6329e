"""`python -m torch_ademamix`."""

import torch

import torch_ademamix
from torch_ademamix import __main__ as command
from torch_ademamix import ops


def printed(capsys) -> dict[str, str]:
    command.main()
    lines = capsys.readouterr().out.splitlines()
    return {name: text.strip() for name, text in (line.split("  ", maxsplit=1) for line in lines)}


def test_report(capsys):
    report = printed(capsys)
    assert report["torch_ademamix"] == torch_ademamix.__version__
    assert report["torch"].startswith(torch.__version__)
    assert f"{torch.get_num_threads()} threads" in report["CPU"]
    assert report["other devices"] == "reference kernels"
    if ops.without_cuda is not None:
        assert report["CUDA"] == f"reference kernels, because {ops.without_cuda}"
    elif not torch.cuda.is_available():
        assert report["CUDA"].startswith("no device; native kernels, compiled by ")
    if ops.native is not None:
        assert f"torch {ops.native.built_with_torch}" in report["native build"]
        assert report["CPU"].startswith(f"native kernels for {ops.cpu_capability(ops.native)}")


def test_report_without_native_kernels(capsys, monkeypatch):
    monkeypatch.setattr(ops, "native", None)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: False)
    report = printed(capsys)
    assert report["native build"] == "none"
    assert report["CPU"].startswith("reference kernels")
