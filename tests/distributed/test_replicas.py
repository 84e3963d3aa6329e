"""Replicated training: DistributedDataParallel, and ZeRO's sharding of whole parameters."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.config import assert_identical
from tests.helpers.sharded import OPTIONS, backward, make_model
from torch_ademamix import AdEMAMix, compile_train_step, release_gradients

pytestmark = pytest.mark.distributed

BITS = pytest.mark.parametrize("bits", [32, 8])


def options(bits):
    return {**OPTIONS, "optim_bits": bits, "min_8bit_size": 256}


def everything(model, optimizer):
    params = list(model.parameters())
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


def ddp_equals_one_process(bits):
    """Bit for bit: of two processes, the mean of the gradients has one rounding, in any order."""
    model, plain = DistributedDataParallel(make_model()), make_model()
    optimizer = AdEMAMix(model.parameters(), **options(bits))
    plain_optimizer = AdEMAMix(plain.parameters(), **options(bits))
    for batch in range(5):
        backward(model, "ddp", batch)
        optimizer.step()
        optimizer.zero_grad()
        x = torch.randn(8, 256, generator=torch.Generator().manual_seed(batch))
        for part in x.chunk(2):
            (plain(part).square().mean() / 2).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert_identical(everything(model, optimizer), everything(plain, plain_optimizer))


def compiled_equals_eager(bits):
    """The model and the step, each compiled by itself, as the refusal of compile_train_step says."""
    models = [DistributedDataParallel(make_model()) for _ in range(2)]
    eager, optimizer = [AdEMAMix(model.parameters(), **{**options(bits), "lr": torch.tensor(1e-2)}) for model in models]
    with pytest.raises(ValueError, match="the model is a DistributedDataParallel"):
        compile_train_step(models[1], optimizer, lambda model, x: model(x).square().mean())
    optimizer.init_state()
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    compiled = torch.compile(models[1], backend="aot_eager")
    for batch in range(3):
        backward(models[0], "ddp", batch)
        eager.step()
        eager.zero_grad()
        backward(compiled, "ddp", batch)
        step()
        optimizer.zero_grad()
    assert_identical(everything(models[1], optimizer), everything(models[0], eager))


@BITS
def test_compiled_ddp(workers, bits):
    workers.run(2, compiled_equals_eager, bits)


def release_is_refused():
    """It reduces gradients after these would be gone."""
    model = DistributedDataParallel(make_model())
    with pytest.raises(ValueError, match="under DistributedDataParallel"):
        release_gradients(model, AdEMAMix(model.parameters()))


def test_release_of_gradients_is_refused(workers):
    workers.run(1, release_is_refused)


@BITS
def test_ddp(workers, bits):
    workers.run(2, ddp_equals_one_process, bits)


def zero_equals_ddp(bits):
    """Each process keeps the state of some parameters; state dicts are whole."""
    models = [DistributedDataParallel(make_model()) for _ in range(2)]
    kwargs = {**options(bits), "stochastic_rounding": False}  # its random bits go by a process's own parameters
    zero = ZeroRedundancyOptimizer(models[0].parameters(), AdEMAMix, **kwargs)
    plain = AdEMAMix(models[1].parameters(), **kwargs)

    def train(batches):
        for batch in batches:
            for model, optimizer in zip(models, (zero, plain), strict=True):
                backward(model, "ddp", batch)
                optimizer.step()
                optimizer.zero_grad()
        assert_identical(*[[p.detach() for p in model.parameters()] for model in models])

    train(range(3))
    assert len(zero.optim.state) < len(plain.state)
    zero.consolidate_state_dict()
    saved = [zero.state_dict() if dist.get_rank() == 0 else None]
    if dist.get_rank() == 0:
        assert_identical(saved[0]["state"], plain.state_dict()["state"])
    dist.broadcast_object_list(saved)
    for state in zero.optim.state.values():
        state.clear()
    zero.load_state_dict(saved[0])
    train(range(3, 6))


@BITS
def test_zero(workers, bits):
    workers.run(2, zero_equals_ddp, bits)
