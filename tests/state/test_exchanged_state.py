"""`optimizer.state` is what is updated, saved and loaded, however others keep, exchange, free or share its tensors."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from tests.helpers.config import assert_identical
from tests.state.test_arenas import CLASSES, everything, train, trained
from torch_ademamix import AdEMAMix, compile_train_step

EVERY_CLASS = pytest.mark.parametrize("cls", CLASSES)


def addresses(optimizer):
    return [t.data_ptr() for state in optimizer.state.values() for t in state.values()]


def storages(optimizer):
    return [t.untyped_storage().data_ptr() for s in optimizer.state.values() for t in s.values() if t.numel()]


def state_of(optimizer):
    return copy.deepcopy(optimizer.state_dict()["state"])


def whole(state_dict):
    return state_dict


def views(state_dict):
    """Without the tensors that were in the state dict."""
    state = {i: {name: t[None][0] for name, t in s.items()} for i, s in state_dict["state"].items()}
    return {**state_dict, "state": state}


@EVERY_CLASS
@pytest.mark.parametrize("kept", [whole, views])
def test_a_state_dict_that_is_kept_keeps_its_values(cls, kept):
    params, optimizer = trained(cls)
    saved = kept(optimizer.state_dict())
    values = copy.deepcopy(saved)
    other = copy.deepcopy(trained(cls, steps=4)[1].state_dict())
    optimizer.load_state_dict(other)
    assert_identical(saved, values)
    assert_identical(state_of(optimizer), other["state"])
    train(params, optimizer, 1)
    assert_identical(saved, values)
    optimizer.load_state_dict(saved)
    assert_identical(state_of(optimizer), values["state"])
    assert len(set(storages(optimizer))) == len(set(storages(trained(cls)[1])))


@EVERY_CLASS
def test_a_state_dict_that_is_gone_lets_loads_write_in_place(cls):
    _, optimizer = trained(cls)
    other = copy.deepcopy(trained(cls, steps=4)[1].state_dict())
    before = addresses(optimizer)
    for _ in range(2):
        saved = optimizer.state_dict()
        optimizer.load_state_dict(saved)  # its own, which it has already
        del saved
        optimizer.load_state_dict(other)
        assert addresses(optimizer) == before
    assert_identical(state_of(optimizer), other["state"])


def test_the_memory_of_a_kept_state_dict_goes_with_it():
    _, optimizer = trained(AdEMAMix)
    other = copy.deepcopy(optimizer.state_dict())
    saved = optimizer.state_dict()
    optimizer.load_state_dict(other)
    moved = addresses(optimizer)
    del saved
    optimizer.load_state_dict(other)
    assert addresses(optimizer) == moved


@EVERY_CLASS
@pytest.mark.parametrize("raw", [False, True], ids=["state_dict", "state"])
def test_states_change_places(cls, raw):
    """Layers or experts are swapped: each state is read before it is overwritten."""
    (p, q) = params = [nn.Parameter(torch.randn(64, 80)) for _ in range(2)]
    optimizer = cls(params)
    train(params, optimizer, 2)
    before = state_of(optimizer)
    state_dict = optimizer.state_dict()
    state = {0: dict(optimizer.state[p]), 1: dict(optimizer.state[q])} if raw else state_dict["state"]
    swapped = {**state_dict, "state": {0: state[1], 1: state[0]}}
    del state_dict, state
    optimizer.load_state_dict(swapped)
    assert_identical(state_of(optimizer), {0: before[1], 1: before[0]})


def test_a_whole_step_follows_a_load_into_new_memory():
    model = nn.Linear(4, 3)
    optimizer = AdEMAMix(model.parameters(), lr=1e-2)
    step = compile_train_step(model, optimizer, lambda model, x: model(x).square().mean(), backend="aot_eager")
    x = torch.randn(8, 4)
    step(x)
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    values = copy.deepcopy(saved)
    step(x)
    optimizer.load_state_dict(values)
    assert_identical(saved["state"][0]["step"], torch.tensor(2.0))  # what it became before the load
    model.load_state_dict(weights)
    step(x)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    assert not torch.equal(optimizer.state[model.weight]["exp_avg"], values["state"][0]["exp_avg"])


def free(tensor):
    size = tensor.untyped_storage().size()
    tensor.untyped_storage().resize_(0)
    return size


@EVERY_CLASS
def test_a_storage_that_was_resized_is_refused(cls):
    params, optimizer = trained(cls)
    other = copy.deepcopy(optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    size = free(optimizer.state[params[1]]["exp_avg_slow"])
    problem = r"the storage of exp_avg_slow of param_groups\[0\]\['params'\]\[.\] has been resized .*separate_state\(\)"
    for act in (
        optimizer.step,
        optimizer.init_state,
        optimizer.separate_state,
        lambda: optimizer.load_state_dict(other),
    ):
        with pytest.raises(RuntimeError, match=problem):
            act()
    assert_identical([p.detach().clone() for p in params], before)
    assert all(state["step"] == 2 for state in optimizer.state.values())
    optimizer.state[params[1]]["exp_avg_slow"].untyped_storage().resize_(size)
    optimizer.load_state_dict(other)
    train(params, optimizer, 1, first=2)
    expected, untouched = trained(cls, steps=3)
    assert_identical(everything(params, optimizer), everything(expected, untouched))


@EVERY_CLASS
def test_separate_state_is_freed_and_restored_one_by_one(cls):
    """As Megatron's optimizer_state_offloader does."""
    params, optimizer = trained(cls)
    optimizer.separate_state()
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    nonempty = [t for t in tensors if t.numel() > 0]
    assert len({t.untyped_storage().data_ptr() for t in nonempty}) == len(nonempty)
    for t in nonempty:
        size, value = t.untyped_storage().size(), t.clone()
        assert size == t.nbytes
        free(t)
        with pytest.raises(RuntimeError, match="has been resized"):
            optimizer.step()
        t.untyped_storage().resize_(size)
        t.copy_(value)
    train(params, optimizer, 2, first=2)
    expected, untouched = trained(cls, steps=4)
    assert_identical(everything(params, optimizer), everything(expected, untouched))


@EVERY_CLASS
def test_separate_state_stays_separate(cls):
    params, optimizer = trained(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.separate_state()
    before = addresses(optimizer)
    optimizer.load_state_dict(saved)
    assert addresses(optimizer) == before
    assert_identical(state_of(optimizer), saved["state"])
    params.append(nn.Parameter(torch.ones(5000)))
    params.append(nn.Parameter(torch.ones(5000)))
    optimizer.add_param_group({"params": params[-2:]})
    train(params, optimizer, 1, first=2)
    for one in (optimizer, copy.deepcopy(optimizer)):
        assert len(set(storages(one))) == len(storages(one))


@pytest.fixture
def mesh():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def exchange(dtensor):
    dtensor._local_tensor = dtensor._local_tensor.clone()


def exchange_data(dtensor):
    dtensor._local_tensor.data = dtensor._local_tensor.clone()


def exchange_storage(dtensor):
    dtensor._local_tensor.set_(dtensor._local_tensor.clone())


def exchange_all(dtensor):
    torch.utils.swap_tensors(dtensor, dtensor.clone())


EXCHANGES = (exchange, exchange_data, exchange_storage, exchange_all)


def distributed_params(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return [nn.Parameter(distribute_tensor(torch.ones(n, 256), mesh, [Shard(0)])) for n in (64, 2)]


def train_distributed(params, optimizer, steps):
    for step in steps:
        for p in params:
            p.grad = (p * (step + 1)).detach()
        optimizer.step()


@EVERY_CLASS
@pytest.mark.parametrize("change", EXCHANGES)
@pytest.mark.parametrize("separate", [False, True])
def test_local_tensors_of_dtensors_are_exchanged(mesh, cls, change, separate):
    """As RL frameworks offload state, and bring it back to other memory; a load comes afterwards."""
    results = []
    for exchanges in (False, True):
        params = distributed_params(mesh)
        optimizer = cls(params, lr=1e-2)
        if separate:
            optimizer.separate_state()
        train_distributed(params, optimizer, range(2))
        saved = copy.deepcopy(optimizer.state_dict())
        dtensors = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
        for steps in (range(2, 4), range(4, 6)):
            for t in dtensors:
                if exchanges:
                    old = t._local_tensor.clone()
                    change(t)
                    assert torch.equal(t._local_tensor, old)
            train_distributed(params, optimizer, steps)
            kept = dict(optimizer.state[params[0]])
            assert all(any(t is value for t in dtensors) for name, value in kept.items() if name != "step")
        for t in dtensors:
            if exchanges:
                change(t)
        optimizer.load_state_dict(saved)
        assert_identical(locals_of(optimizer.state_dict()), locals_of(saved))
        train_distributed(params, optimizer, range(6, 7))
        results.append((locals_of(optimizer.state_dict()), [p.to_local().detach() for p in params]))
    assert_identical(results[1], results[0])


def locals_of(state_dict):
    return [
        {name: t if name == "step" else t.to_local() for name, t in state.items()}
        for state in state_dict["state"].values()
    ]


@EVERY_CLASS
def test_separate_dtensors_are_freed_and_restored(mesh, cls):
    params = distributed_params(mesh)
    optimizer = cls(params, lr=1e-2)
    optimizer.separate_state()
    train_distributed(params, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    for t in [t.to_local() for s in optimizer.state.values() for name, t in s.items() if name != "step"]:
        value = t.clone()
        size = free(t)
        with pytest.raises(RuntimeError, match="has been resized"):
            optimizer.step()
        t.untyped_storage().resize_(size)
        t.copy_(value)
    train_distributed(params, optimizer, range(2, 3))
    optimizer.load_state_dict(before)
    assert_identical(locals_of(optimizer.state_dict()), locals_of(before))


def test_a_dtensors_state_dict_that_is_kept(mesh):
    params = distributed_params(mesh)
    optimizer = AdEMAMix(params, lr=1e-2)
    train_distributed(params, optimizer, range(1))
    other = copy.deepcopy(optimizer.state_dict())
    train_distributed(params, optimizer, range(1, 2))
    before = [t.to_local().data_ptr() for t in (optimizer.state[p]["exp_avg"] for p in params)]
    optimizer.load_state_dict(other)
    assert [t.to_local().data_ptr() for t in (optimizer.state[p]["exp_avg"] for p in params)] == before
    train_distributed(params, optimizer, range(1, 2))
    saved = optimizer.state_dict()
    values = copy.deepcopy(locals_of(saved))
    optimizer.load_state_dict(other)
    assert_identical(locals_of(saved), values)
    assert_identical(locals_of(optimizer.state_dict()), locals_of(other))


def train_elsewhere(made):
    """What the other process does."""
    torch.set_num_threads(1)
    for params, optimizer, saved in made:
        train(params, optimizer, 1, first=2)
        assert len(set(storages(optimizer))) < len(storages(optimizer))  # arenas here too
        if saved is not None:
            optimizer.load_state_dict(saved)


def test_state_that_is_sent_to_a_process_is_shared():
    """As AdamW's, which A3C relies on: steps and loads of either process are both's."""
    made, plain = [], []
    for cls, share, loads in ((AdEMAMix, True, False), (CLASSES[1], False, False), (AdEMAMix, False, True)):
        params, optimizer = trained(cls)
        if share:
            for p, state in optimizer.state.items():
                p.data.share_memory_()
                for t in state.values():
                    t.share_memory_()
        made.append((params, optimizer, copy.deepcopy(optimizer.state_dict()) if loads else None))
        plain.append(trained(cls, steps=4))
    process = torch.multiprocessing.get_context("spawn").Process(target=train_elsewhere, args=(made,))
    process.start()
    process.join()
    assert process.exitcode == 0
    for (params, optimizer, saved), expected in zip(made, plain, strict=True):
        if saved is not None:
            assert_identical(state_of(optimizer), saved["state"])
            continue
        assert all(state["step"] == 3 for state in optimizer.state.values())
        train(params, optimizer, 1, first=3)
        assert_identical(everything(params, optimizer), everything(*expected))
