"""Prints versions, the build, and the kernels used on each device: `python -m torch_ademamix`.

`python -m torch_ademamix compile` compiles CUDA kernels ahead of time (precompile.py).
"""

import platform
import sys
from collections.abc import Iterator

import torch

import torch_ademamix
from torch_ademamix import ops, precompile
from torch_ademamix.ops import cuda


def report() -> Iterator[tuple[str, str]]:
    """What a bug report needs, as pairs of a name and a text."""
    system = f"{platform.system()} {platform.machine()}"
    yield "torch_ademamix", torch_ademamix.__version__
    yield "Python", f"{platform.python_version()}, {system}"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    yield "native build", _build()
    yield "CPU", f"{_kernels('CPU')}, {torch.get_num_threads()} threads"
    yield "CUDA", _cuda()
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"CUDA device {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    yield "other devices", "reference kernels"


def _build() -> str:
    if ops.native is None:
        return "none"
    built = f"torch {ops.native.built_with_torch}, {ops.native.compiler}"
    return f"{built}, CPU kernels for {', '.join(ops.native.cpu_capabilities.split())}"


def _cuda() -> str:
    if ops.without_cuda is not None:
        return f"reference kernels, because {ops.without_cuda}"
    compiled = f"native kernels, compiled by {cuda.find_nvrtc()}, kept in {cuda.cache_folder()}"
    return compiled if torch.cuda.is_available() else f"no device; {compiled}"


def _kernels(dispatch_key: str) -> str:
    """Asks the dispatcher, which knows what has been loaded."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if not has_kernel("torch_ademamix::_ademamix_step_", dispatch_key):
        return "reference kernels"
    if dispatch_key == "CPU" and ops.native is not None:
        return f"native kernels for {ops.cpu_capability(ops.native)}"
    return "native kernels"


def main() -> None:
    rows = list(report())
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        precompile.main(sys.argv[2:])
    else:
        main()
