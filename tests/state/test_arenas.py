"""State in flat tensors: where it lies, who may replace it, and when its memory is free."""

import copy
import gc
import pickle
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.numerics.blockwise import BLOCK_SIZE

CLASSES = (AdEMAMix, AdEMAMix8bit)
SHAPES = ((3, 5), (300,), (), (0, 2), (64, 80), (4, 8, 3, 3))


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    params[0].data = params[0].data.mT.contiguous().mT
    params[5].data = params[5].data.to(memory_format=torch.channels_last)
    return params


def train(params, optimizer, steps, first=0, some=lambda i: True):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = grad if some(i) else None
        optimizer.step()


def trained(cls, steps=2, dtype=torch.float32, **options):
    params = make_params(dtype)
    optimizer = cls(params, lr=1e-2, **options)
    train(params, optimizer, steps)
    return params, optimizer


def everything(params, optimizer):
    return [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])


def flats(optimizer):
    """The flat tensors behind state, by identity."""
    return {id(t._base): t._base for state in optimizer.state.values() for t in state.values()}


@pytest.mark.parametrize("cls", CLASSES)
def test_state_is_views_of_a_few_flat_tensors(cls):
    params, optimizer = trained(cls, dtype=torch.bfloat16, master_weights="remainder")
    assert len(flats(optimizer)) == (5 if cls is AdEMAMix else 5 + 8)
    for p in params:
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq", "master_remainder"):
            assert state[name].shape == p.shape
            assert state[name].storage_offset() % BLOCK_SIZE == 0
        assert state["master_remainder"].stride() == p.stride()
        if "exp_avg_absmax" not in state:
            assert state["exp_avg"].stride() == p.stride()
        assert state["step"].shape == ()


def test_groups_share_them():
    """But for groups that store state otherwise, and those that come later."""
    params = [nn.Parameter(torch.ones(300)) for _ in range(4)]
    groups = [{"params": [p], "lr": 10.0**-i} for i, p in enumerate(params[:3])]
    optimizer = AdEMAMix([*groups[:2], {**groups[2], "optim_bits": 8, "min_8bit_size": 1}])
    optimizer.init_state()
    assert len(flats(optimizer)) == 4 + 7
    optimizer.add_param_group({"params": [params[3]]})
    optimizer.init_state()
    assert len(flats(optimizer)) == 4 + 7 + 4


def test_all_parameters_get_state_at_the_first_step():
    params = make_params()
    params[1].requires_grad_(False)
    optimizer = AdEMAMix(params)
    train(params, optimizer, 1, some=lambda i: i == 0)
    assert [p in optimizer.state for p in params] == [True, False, True, True, True, True]
    assert [optimizer.state[p]["step"].item() for p in (params[0], params[2])] == [1, 0]
    before = flats(optimizer).keys()
    params[1].requires_grad_(True)
    train(params, optimizer, 1)
    assert len(flats(optimizer)) == 8
    assert before < flats(optimizer).keys()
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_padding(cls):
    """Of GPT-2's shapes, below half a percent of the state."""
    shapes = [(768,), (768, 2304), (2304,), (768, 768), (768, 3072), (3072,), (3072, 768), (1024, 768), (50257, 768)]
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = cls(params)
    optimizer.init_state()
    allocated = sum(flat.nbytes for flat in flats(optimizer).values())
    used = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert used <= allocated < 1.005 * used


@pytest.mark.parametrize("cls", CLASSES)
def test_loading_writes_in_place(cls):
    params, optimizer = trained(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    addresses = [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    train(params, optimizer, 2, first=2)
    optimizer.load_state_dict(saved)
    assert [t.data_ptr() for state in optimizer.state.values() for t in state.values()] == addresses
    assert_identical(optimizer.state_dict()["state"], saved["state"])


def test_loading_without_a_parameter_begins_it_anew():
    params, optimizer = trained(AdEMAMix)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1]
    optimizer.load_state_dict(saved)
    assert optimizer.state[params[1]]["step"] == 0
    assert not optimizer.state[params[1]]["exp_avg_slow"].any()
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_have_arenas(cls, copied):
    params, optimizer = trained(cls)
    new_params, new = copied((params, optimizer))
    assert len(flats(new)) == len(flats(optimizer))
    train(params, optimizer, 2, first=2)
    train(new_params, new, 2, first=2)
    assert_identical(everything(new_params, new), everything(params, optimizer))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_saved_file_is_no_larger(cls, tmp_path):
    """Than that of tensors that aren't views."""
    params = [nn.Parameter(torch.randn(768, 256)), *(nn.Parameter(torch.randn(768)) for _ in range(50))]
    optimizer = cls(params)
    train(params, optimizer, 1)
    state_dict = optimizer.state_dict()
    torch.save(state_dict, tmp_path / "views")
    state_dict["state"] = {i: {k: t.clone() for k, t in s.items()} for i, s in state_dict["state"].items()}
    torch.save(state_dict, tmp_path / "clones")
    assert (tmp_path / "views").stat().st_size <= (tmp_path / "clones").stat().st_size
    loaded = torch.load(tmp_path / "views", weights_only=True)
    assert_identical(loaded["state"], state_dict["state"])


def replace(optimizer, p):
    for name, value in optimizer.state[p].items():
        optimizer.state[p][name] = value.clone()


def replace_entry(optimizer, p):
    optimizer.state[p] = {name: value.clone() for name, value in optimizer.state[p].items()}


def update_entry(optimizer, p):
    optimizer.state[p].update(exp_avg=optimizer.state[p]["exp_avg"].clone())


def replace_all(optimizer, p):
    optimizer.state = defaultdict(dict, {q: {k: t.clone() for k, t in s.items()} for q, s in optimizer.state.items()})


def exchange_data(optimizer, p):
    """As `optimizer_to` functions move state to another device."""
    for value in optimizer.state[p].values():
        value.data = value.data.clone()


REPLACEMENTS = (replace, replace_entry, update_entry, replace_all, exchange_data)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("change", REPLACEMENTS)
@pytest.mark.parametrize("which", [0, 4])
def test_replaced_state_is_heard(cls, change, which):
    params, optimizer = trained(cls)
    expected, untouched = trained(cls)
    old = dict(optimizer.state[params[which]])
    change(optimizer, params[which])
    if change is not exchange_data:
        old["exp_avg"].zero_()  # no longer the optimizer's
    replaced = dict(optimizer.state[params[which]])
    train(params, optimizer, 2, first=2)
    train(expected, untouched, 2, first=2)
    assert_identical(everything(params, optimizer), everything(expected, untouched))
    if change is not exchange_data:  # the tensors that were put there are those that were updated
        assert all(optimizer.state[params[which]][name] is value for name, value in replaced.items())


@pytest.mark.parametrize("cls", CLASSES)
def test_state_moved_away_and_back(cls):
    """As reinforcement learning frameworks offload it, here from the CPU to the CPU."""
    params, optimizer = trained(cls)
    expected, untouched = trained(cls)
    for first in (2, 4):
        for state in optimizer.state.values():
            for name, value in state.items():
                state[name] = value.clone()
        train(params, optimizer, 2, first=first)
        train(expected, untouched, 2, first=first)
    assert_identical(everything(params, optimizer), everything(expected, untouched))


@pytest.mark.parametrize("cls", CLASSES)
def test_replaced_state_frees_its_arena(cls):
    params, optimizer = trained(cls)
    refs = [weakref.ref(flat) for flat in flats(optimizer).values()]
    for p in params[:-1]:
        replace(optimizer, p)
    assert any(ref() is not None for ref in refs)
    replace(optimizer, params[-1])
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_replaced_state_frees_memory():
    # 64 MiB of each moment: what is freed above 32 the system has back at once (mallopt(3)).
    params = [nn.Parameter(torch.zeros(1 << 21)) for _ in range(8)]
    optimizer = AdEMAMix(params)
    optimizer.init_state()
    for flat in flats(optimizer).values():
        flat.fill_(0)  # now it is resident
    del flat
    before = resident()
    optimizer.state.clear()
    gc.collect()
    assert before - resident() > 190 << 20  # of 192 MiB


def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096


def test_reset():
    """People empty `optimizer.state`, or put another dict there, to begin anew."""
    for reset in (lambda o: o.state.clear(), lambda o: setattr(o, "state", defaultdict(dict))):
        params, optimizer = trained(AdEMAMix)
        reset(optimizer)
        train(params, optimizer, 1, first=2)
        assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_parameter_takes_anothers_state():
    """As gaussian splatting does when it adds and removes points."""
    (p,), (q,) = ([nn.Parameter(torch.ones(n, 3))] for n in (4, 6))
    optimizer = AdEMAMix([p], lr=1e-2)
    train([p], optimizer, 2)
    stored = optimizer.state[p]
    for name in ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
        stored[name] = torch.cat([stored[name], torch.zeros(2, 3)])
    del optimizer.state[p]
    optimizer.param_groups[0]["params"][0] = q
    optimizer.state[q] = stored
    train([q], optimizer, 1, first=2)
    assert optimizer.state[q]["step"] == 3
    assert list(optimizer.state) == [q]


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_may_change_their_form(cls):
    """The order of their elements in memory, and their dtype; the state keeps its own."""
    params, optimizer = trained(cls)
    expected, untouched = trained(cls)
    for p in (params[4], params[5]):
        p.data = p.data.mT.contiguous().mT
    train(params, optimizer, 2, first=2)
    train(expected, untouched, 2, first=2)
    assert_identical(everything(params, optimizer), everything(expected, untouched))
    params[4].data = params[4].data.bfloat16()
    train(params, optimizer, 1, first=4)
    assert optimizer.state[params[4]]["step"] == 5


def test_entries_of_others():
    """They live in the same dicts, are saved and loaded, and cost no plan."""
    params, optimizer = trained(AdEMAMix)
    plan = optimizer._plan_cache.plan
    for p in params:
        optimizer.state[p]["slow_buffer"] = p.detach().clone()
    assert optimizer._plan_cache.plan is plan
    train(params, optimizer, 1, first=2)
    saved = copy.deepcopy(optimizer.state_dict())
    new_params = make_params()
    new = AdEMAMix(new_params)
    new.load_state_dict(saved)
    assert_identical(new.state_dict()["state"], saved["state"])


def test_state_dicts_are_plain():
    _, optimizer = trained(AdEMAMix)
    assert {type(s) for s in optimizer.state_dict()["state"].values()} == {dict}
    for copied in (copy.deepcopy(optimizer.state), pickle.loads(pickle.dumps(optimizer.state))):
        assert type(copied) is defaultdict
        assert {type(s) for s in copied.values()} == {dict}


def test_a_refused_call_comes_before_the_first_write():
    """Also where it would have been a later one."""
    a, b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdEMAMix([a, b])
    train([a, b], optimizer, 1)
    b.data = b.data.double()
    a.grad, b.grad = torch.ones(4), None
    b.grad = torch.ones(4, dtype=torch.float64)
    before = everything([a, b], optimizer)
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\['params'\]\[1\]: .*exp_avg has dtype torch.float32"):
        optimizer.step()
    assert_identical(everything([a, b], optimizer), before)


def test_sets_of_gradients_that_change(monkeypatch):
    """As with a mixture of experts: each step is one op call."""
    from torch_ademamix import ops

    calls = []
    step = ops.ademamix_step_
    monkeypatch.setattr(ops, "ademamix_step_", lambda *args, **kwargs: (calls.append(1), step(*args, **kwargs)))
    params = [nn.Parameter(torch.randn(7)) for _ in range(30)]
    expected = copy.deepcopy(params)
    optimizer = AdEMAMix(params, lr=1e-2)
    separate = [AdEMAMix([p], lr=1e-2) for p in expected]
    for step_number in range(6):
        for i, (p, q) in enumerate(zip(params, expected, strict=True)):
            p.grad = torch.full((7,), float(i + step_number)) if i % 3 == step_number % 3 else None
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        assert len(calls) == 1
        for one in separate:
            one.step()
        calls.clear()
    assert_identical(params, expected)


@pytest.mark.parametrize("cls", [AdEMAMix, AdEMAMix8bit])
def test_a_module_swaps_its_parameters(monkeypatch, cls):
    """Nothing but Python refers to a parameter: `swap_tensors` raises for others."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = torch.nn.Linear(64, 64)
    optimizer = cls(model.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)(torch.ones(2, 64, dtype=dtype)).sum().backward()
        optimizer.step()
        model.zero_grad()
    assert optimizer.state[model.weight]["step"] == 2
