"""`python -m torch_ademamix`, and where the CUDA library finds things."""

import os
from pathlib import Path

import pytest
import torch

import torch_ademamix
from torch_ademamix import __main__ as command
from torch_ademamix import ops, precompile
from torch_ademamix.ops import cuda


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


@pytest.mark.skipif(ops.without_cuda is None, reason="has CUDA kernels")
def test_compile_without_cuda(capsys, tmp_path):
    with pytest.raises(SystemExit):
        precompile.main(["--arch", "sm_90", "--folder", str(tmp_path), "optim_bits=8"])
    assert f"there are no CUDA kernels: {ops.without_cuda}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--arch", "hopper"], "'hopper' is no architecture; sm_90, 90 and 9.0 are"),
        (
            ["--arch", "90", "--", "optim_bits"],
            "'optim_bits' is no option of AdEMAMix; write optim_bits=8, for example",
        ),
    ],
)
def test_compile_explains_its_arguments(capsys, arguments, text):
    with pytest.raises(SystemExit):
        precompile.main(arguments)
    assert text in capsys.readouterr().err


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and an entry in passwd, as in a container that is run with any uid."""
    for name in ("HOME", "XDG_CACHE_HOME", cuda.CACHE_VARIABLE):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)  # as it then does itself


@pytest.mark.usefixtures("homeless")
def test_cache_folder_of_a_user_without_a_home(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert cuda.cache_folder() == Path(f"/scratch/torch_ademamix-{os.getuid()}")
    monkeypatch.delenv("TMPDIR")
    assert cuda.cache_folder() == Path(f"/tmp/torch_ademamix-{os.getuid()}")
    monkeypatch.setenv(cuda.CACHE_VARIABLE, "/named")
    assert cuda.cache_folder() == Path("/named")


@pytest.mark.parametrize("place", ["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib", "torch/lib", "another/nvidia/cu13/lib"])
def test_nvrtc_is_found(monkeypatch, tmp_path, place):
    monkeypatch.setattr(torch.version, "cuda", "98.6")  # which the loader doesn't know either
    assert cuda.find_nvrtc() is None
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    monkeypatch.syspath_prepend(tmp_path / "another")
    file = tmp_path / place / "libnvrtc.so.98"
    file.parent.mkdir(parents=True)
    file.touch()
    assert cuda.find_nvrtc() == str(file)


def test_cuda_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(cuda, "_without", None)
    monkeypatch.setenv(cuda.ENABLED_VARIABLE, "0")
    assert cuda.load() == "TORCH_ADEMAMIX_CUDA is 0"
