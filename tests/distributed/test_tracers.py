"""torchtitan's way with DTensors: make_fx traces a step on their shards, with parameters and state swapped in."""

import pytest

from tests.helpers.config import assert_identical
from tests.helpers.sharded import BITS, OPTIONS, backward, full, full_state, make_model
from tests.helpers.tracers import CAN_SWAP, step_nodes, trace
from torch_ademamix import AdEMAMix

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not CAN_SWAP, reason="this torch has no swap_in_optimizer_params_and_state"),
]


def traced_steps_equal_eager_steps(bits):
    """Two steps by one graph, and an eager one after them."""
    options = {**OPTIONS, **BITS[bits]}
    runs = []
    for traced in (False, True):
        model = make_model("fsdp")
        optimizer = AdEMAMix(model.parameters(), **options)
        optimizer.init_state()
        grads = None
        for batch in range(3):
            backward(model, "fsdp", batch)
            if grads is None:
                grads = [p.grad for p in model.parameters()]
                graph, tensors = trace(optimizer) if traced else (None, ())
            else:
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p.grad = grad.copy_(p.grad)  # where the graph reads it
            graph(*tensors) if traced and batch < 2 else optimizer.step()
            optimizer.zero_grad()
        if traced:
            assert len(step_nodes(graph)) == (2 if bits == 8 else 1)  # one per kind of state
            assert all(optimizer.state[p].slice is not None for p in model.parameters())
        runs.append(([full(p.detach()) for p in model.parameters()], full_state(optimizer, model.parameters())))
    assert_identical(*runs)


@pytest.mark.parametrize("bits", BITS)
def test_traced_step(workers, bits):
    workers.run(2, traced_steps_equal_eager_steps, bits)
