"""Shows a bug of torch.compile that torch_ademamix/numerics/pairs.py avoids: `python -m tools.complex_views`.

An op writes to a real view of a complex tensor. AOTAutograd makes that view again from its base, in the dtype of the
base (torch/_higher_order_ops/auto_functionalize.py, AsStridedViewInfo), and raises for a storage that is too small.
"""

import torch

torch.library.define("torch_ademamix_tools::increment_", "(Tensor(a!)[] tensors) -> ()")


@torch.library.impl("torch_ademamix_tools::increment_", "CompositeExplicitAutograd")
def increment_(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.add_(1)


@torch.library.register_fake("torch_ademamix_tools::increment_")
def _(tensors: list[torch.Tensor]) -> None:
    return None


def increment(x: torch.Tensor) -> None:
    torch.ops.torch_ademamix_tools.increment_([torch.view_as_real(x)])


def main() -> None:
    x = torch.zeros(2, dtype=torch.complex64)
    increment(x)
    print(f"torch {torch.__version__}, eager: {x.tolist()}")
    y = torch.zeros_like(x)
    try:
        torch.compile(increment, backend="aot_eager")(y)
    except RuntimeError as error:
        print(f"compiled: {error}")
    else:
        print(f"compiled: {y.tolist()}")


if __name__ == "__main__":
    main()
