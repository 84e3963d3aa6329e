"""torch.distributed.checkpoint saves, reshards and loads the optimizer's state, as it does AdamW's."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.config import assert_identical
from tests.helpers.sharded import OPTIONS, full, full_state, make_model
from torch_ademamix import AdEMAMix
from torch_ademamix.distributed import LoadPlanner, get_full_optimizer_state_dict, set_full_optimizer_state_dict
from torch_ademamix.numerics.blockwise import dequantize
from torch_ademamix.variants import ADANA_OPTIONS

pytestmark = pytest.mark.distributed

STORED = {
    "32": {},
    "8": {"optim_bits": 8, "min_8bit_size": 600},  # weights, not biases, which can't be quantized in shards
    "8, slow too": {"optim_bits": 8, "min_8bit_size": 600, "slow_ema_bits": 8},
    "12": {"optim_bits": 8, "min_8bit_size": 600, "slow_ema_bits": 12},
    "12 without exp_avg": {"optim_bits": 8, "min_8bit_size": 600, "slow_ema_bits": 12, "betas": (0.0, 0.99, 0.999)},
    "32 without exp_avg": {"betas": (0.0, 0.99, 0.999)},
    "8 and remainders": {"optim_bits": 8, "min_8bit_size": 600, "master_weights": "remainder"},
    "ADANA, 12": {**ADANA_OPTIONS, "optim_bits": 8, "min_8bit_size": 600, "slow_ema_bits": 12},
    "8 and remainders of 8 bits": {"optim_bits": 8, "min_8bit_size": 600, "master_weights": "remainder8"},
}
QUICK = ("32", "8, slow too", "12 without exp_avg", "8 and remainders")  # of the formats, those that every run reshards


def make(layout, stored, **options):
    model = make_model(layout, dtype=torch.bfloat16 if "remainders" in stored else torch.float32)
    return model, AdEMAMix(model.parameters(), **{**OPTIONS, **STORED[stored], **options})


def train(model, optimizer, batches):
    """Gradients that are the same for every number of processes."""
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Whole parameters, whole state and the options, to compare runs by."""
    groups = [{**group, "params": None, "betas": tuple(group["betas"])} for group in optimizer.param_groups]
    return [full(p.detach()).clone() for p in model.parameters()], full_state(optimizer, model.parameters()), groups


def state_dicts(model, optimizer, **options):
    options = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_state_dicts(model, optimizer, state, **options):
    options = StateDictOptions(**options)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def write(path, value):
    if dist.get_rank() == 0:
        torch.save(value, path)
    dist.barrier()


def save(folder, layout, stored, options=None, flat=False):
    model, optimizer = make(layout, stored, **(options or {}))
    train(model, optimizer, range(3))
    state = state_dicts(model, optimizer, flatten_optimizer_state_dict=flat)
    dcp.save(state, checkpoint_id=folder / "checkpoint")
    write(folder / "saved.pt", everything(model, optimizer))
    train(model, optimizer, range(3, 6))
    write(folder / "continued.pt", everything(model, optimizer))


def load(folder, layout, stored, options=None, flat=False):
    """Goes on as the run that was saved went on, bit for bit."""
    model, optimizer = make(layout, stored, **{**(options or {}), "weight_decay": 0.5})
    torch.nn.init.zeros_(model.up.weight)
    state = state_dicts(model, optimizer, flatten_optimizer_state_dict=flat)
    dcp.load(state, checkpoint_id=folder / "checkpoint", planner=LoadPlanner())
    set_state_dicts(model, optimizer, state, flatten_optimizer_state_dict=flat)
    goes_on(folder, model, optimizer)


def goes_on(folder, model, optimizer):
    assert_identical(everything(model, optimizer), torch.load(folder / "saved.pt"))
    train(model, optimizer, range(3, 6))
    assert_identical(everything(model, optimizer), torch.load(folder / "continued.pt"))


@pytest.mark.parametrize("stored", [s if s in QUICK else pytest.param(s, marks=pytest.mark.nightly) for s in STORED])
def test_resharding(workers, tmp_path, stored):
    """From four processes to four, two and one, and to a model that isn't sharded."""
    workers.run(4, save, tmp_path, "fsdp", stored)
    for world_size, layout in ((4, "fsdp"), (2, "fsdp"), (1, "fsdp"), (1, None)):
        workers.run(world_size, load, tmp_path, layout, stored)


@pytest.mark.each_value
@pytest.mark.parametrize("before", [(1, None), (2, "tp"), (4, "fsdp_tp"), (4, "fsdp")])
@pytest.mark.parametrize("after", [(4, "fsdp"), (4, "fsdp_tp")])
def test_resharding_between_layouts(workers, tmp_path, before, after):
    """To nearest: parts of a row draw random bits of their own."""
    options = {"stochastic_rounding": False}
    for (world_size, layout), action in ((before, save), (after, load)):
        workers.run(world_size, action, tmp_path, layout, "8", options)


@pytest.mark.parametrize("flat", [False, True])
def test_resuming(workers, tmp_path, flat):
    """A learning rate may be a tensor."""
    options = {"lr": torch.tensor([1e-2], dtype=torch.float64)}
    workers.run(2, save, tmp_path, "fsdp", "8", options, flat)
    workers.run(2, load, tmp_path, "fsdp", "8", options, flat)


def save_full(folder, stored, ours):
    model, optimizer = make("fsdp", stored)
    train(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"model": get_model_state_dict(model, options=options)}
    if ours:
        state["optimizer"] = get_full_optimizer_state_dict(model, optimizer)
    else:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() != 0:
        assert state == {"model": {}, "optimizer": {}}
    write(folder / "checkpoint.pt", state)
    write(folder / "saved.pt", everything(model, optimizer))
    train(model, optimizer, range(3, 6))
    write(folder / "continued.pt", everything(model, optimizer))


def load_full(folder, layout, stored, ours, broadcast):
    """Every process reads the file, or the first does and sends it to the others."""
    model, optimizer = make(layout, stored, weight_decay=0.5)
    if broadcast:
        state = torch.load(folder / "checkpoint.pt") if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, state["model"], options=options)
        if ours:
            set_full_optimizer_state_dict(model, optimizer, state["optimizer"])
        else:
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    else:
        state = torch.load(folder / "checkpoint.pt", mmap=True)
        set_model_state_dict(model, state["model"], options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    goes_on(folder, model, optimizer)


@pytest.mark.each_value
@pytest.mark.parametrize(
    ("stored", "ours", "broadcast"),
    [
        ("32", False, True),
        ("32", True, False),
        ("8", True, False),  # of which neither NCCL nor gloo can send 16-bit codes
        ("8, slow too", False, True),
        ("12", True, True),
        ("8 and remainders", True, True),
        ("8 and remainders of 8 bits", True, True),
    ],
)
def test_full_state_dicts(workers, tmp_path, stored, ours, broadcast):
    workers.run(4, save_full, tmp_path, stored, ours)
    other = "fsdp_tp" if stored == "32" else "hsdp"  # parts of a row draw random bits of their own
    for world_size, layout in ((2, "fsdp"), (4, other), (1, None)):
        workers.run(world_size, load_full, tmp_path, layout, stored, ours, broadcast and layout is not None)


class Largest(TorchDispatchMode):
    """The largest plain tensor, in bytes, that an op returns."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.nbytes = max([self.nbytes, *(t.nbytes for t in tree_leaves(out) if type(t) is torch.Tensor)])
        return out


def whole_tensors_are_on_the_first_rank_only(layout):
    model, optimizer = make(layout, "8")
    train(model, optimizer, range(1))
    state = [value for values in optimizer.state.values() for value in values.values()]
    largest = max(value.to_local().nbytes for value in state if isinstance(value, DTensor))
    with Largest() as mode:
        whole = get_full_optimizer_state_dict(model, optimizer)
    assert (mode.nbytes <= largest) == (dist.get_rank() != 0)
    expected = full_state(optimizer, model.parameters())
    if dist.get_rank() == 0:
        assert_identical([whole["state"][name] for name, _ in model.named_parameters()], expected)
    else:
        assert whole == {}


@pytest.mark.parametrize("layout", ["fsdp", "fsdp_tp", "hsdp"])
def test_whole_tensors_are_on_the_first_rank_only(workers, layout):
    workers.run(4, whole_tensors_are_on_the_first_rank_only, layout)


def full_state_of_another_format_is_sent():
    """Where one process has it, it can't be converted."""
    model, optimizer = make("fsdp", "8")
    train(model, optimizer, range(1))
    saved = get_full_optimizer_state_dict(model, optimizer)
    model, optimizer = make("fsdp", "32")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=r"up.weight is .*torch.int8.* but must be .*torch.float32.*: load it with"):
        set_full_optimizer_state_dict(model, optimizer, saved)
    assert_identical(everything(model, optimizer), before)


def full_state_of_another_format(folder):
    """Whole state is converted as ever, where it can't be quantized in shards too."""
    plain = make_model(), make_model("fsdp")
    optimizers = [AdEMAMix(plain[0].parameters(), optim_bits=8, min_8bit_size=0), AdEMAMix(plain[1].parameters())]
    train(plain[0], optimizers[0], range(2))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state[plain[1].up.bias]["exp_avg"].dtype == torch.float32
    for p, q in zip(plain[0].parameters(), plain[1].parameters(), strict=True):
        codes, absmax = (optimizers[0].state[p][name] for name in ("exp_avg", "exp_avg_absmax"))
        expected = dequantize(codes, absmax.flatten(), "signed_sqrt_int8")
        assert_identical(full(optimizers[1].state[q]["exp_avg"]), expected)
    train(plain[1], optimizers[1], range(1))


def shards_have_their_own_memory():
    """Of a whole state dict, a process keeps no more than its part."""
    model, optimizer = make("fsdp", "8")
    train(model, optimizer, range(1))
    state = optimizer.state[model.up.weight]
    whole = {name: full(value) for name, value in state.items()}
    saved = optimizer.state_dict()
    saved["state"][0] = whole
    optimizer.load_state_dict(saved)
    for name, value in optimizer.state[model.up.weight].items():
        if name != "step":
            part = value.to_local()
            assert part.untyped_storage().nbytes() == part.nbytes, name


def state_is_made_without_a_trace():
    """torch makes missing state by a step with gradients and learning rate 0."""
    model, optimizer = make("fsdp", "8", lr=torch.tensor(1e-2))
    before = [full(p.detach()).clone() for p in model.parameters()]
    lr = optimizer.param_groups[0]["lr"]
    get_optimizer_state_dict(model, optimizer)
    assert_identical([full(p.detach()) for p in model.parameters()], before)
    assert optimizer.param_groups[0]["lr"] is lr
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}  # as torch's own optimizers
    model, optimizer = make("fsdp", "8")
    optimizer.init_state()
    get_optimizer_state_dict(model, optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {0}


@pytest.mark.parametrize(
    "case",
    [shards_have_their_own_memory, state_is_made_without_a_trace, full_state_of_another_format_is_sent],
    ids=lambda f: f.__name__,
)
def test_on_two(workers, case):
    workers.run(2, case)


def test_full_state_of_another_format(workers, tmp_path):
    workers.run(2, full_state_of_another_format, tmp_path)


def other_precision(folder, stored, message):
    """Refused before the checkpoint is read with LoadPlanner; else when the optimizer is to take it."""
    model, optimizer = make("fsdp", stored)
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    state = state_dicts(model, optimizer)
    with pytest.raises(CheckpointException, match=message):
        dcp.load(state, checkpoint_id=folder / "checkpoint", planner=LoadPlanner())
    assert_identical(everything(model, optimizer), before)
    if "lost" in message:
        return
    if stored == "8":  # torch itself refuses, since the scales aren't there
        with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: .*_absmax"):
            dcp.load(state, checkpoint_id=folder / "checkpoint")
        assert_identical(everything(model, optimizer), before)
        return
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    with pytest.raises(ValueError, match=r"load the checkpoint with the (optim_bits, slow_ema_bits|master_weights)"):
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


@pytest.mark.parametrize(
    ("saved", "stored", "message"),
    [
        ("8", "32", r"up.weight.exp_avg has dtype torch.int8 in the checkpoint, but must be torch.float32"),
        ("32", "8", r"up.weight.exp_avg has dtype torch.float32 in the checkpoint, but must be torch.int8"),
        ("8", "8, slow too", r"exp_avg_slow has dtype torch.int16 in the checkpoint, but must be torch.int8"),
        (
            "8 and remainders",
            "8 and remainders of 8 bits",
            r"master_remainder has dtype torch.int16 in the checkpoint, but must be torch.int8",
        ),
        ("8 and remainders", "8", r"checkpoint has .*up.weight.master_remainder.*, which would be lost"),
    ],
)
def test_other_precision_is_refused(workers, tmp_path, saved, stored, message):
    workers.run(2, save, tmp_path, "fsdp", saved)
    workers.run(2, other_precision, tmp_path, stored, message)


def other_shape(folder):
    model = make_model("fsdp", hidden=256)
    optimizer = AdEMAMix(model.parameters(), **OPTIONS)
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    message = (
        r"Size mismatch between saved torch.Size\(.*512.*\) and current: torch.Size\(.*256.*\) for optimizer.state"
    )
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    with pytest.raises(CheckpointException, match=message):
        dcp.load(state, checkpoint_id=folder / "checkpoint", planner=LoadPlanner())
    assert_identical(everything(model, optimizer), before)


def test_another_shape_is_refused(workers, tmp_path):
    workers.run(2, save, tmp_path, "fsdp", "32")
    workers.run(2, other_shape, tmp_path)


def bad_state_dicts():
    """In memory: what differs is said, and nothing changes."""
    model, optimizer = make("fsdp", "8")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    mesh = init_device_mesh("cpu", (1, 2))
    placed = lambda value, *placements: distribute_tensor(full(value.int()), mesh, placements)  # noqa: E731
    bends = {
        r"\[0\]\['exp_avg'\] has shape \[511, 256\], but must have \[512, 256\]": lambda s: {
            **s,
            "exp_avg": s["exp_avg"][:511],
        },
        r"\['exp_avg_absmax'\] has shape \[511, 1\], but must have \[512, 1\]": lambda s: {
            **s,
            "exp_avg_absmax": s["exp_avg_absmax"][:511],
        },
        r"\['exp_avg'\] is a DTensor placed \(Replicate\(\), Shard\(dim=0\)\) on .* but its parameter is a DTensor": (
            lambda s: {**s, "exp_avg": placed(s["exp_avg"], Replicate(), Shard(0)).byte()}
        ),
        r"\['exp_avg'\] is a plain tensor, but its parameter is a DTensor placed": lambda s: {
            **s,
            "exp_avg": full(s["exp_avg"]),
        },
        "has entries": lambda s: {"step": s["step"]},
    }
    for message, bend in bends.items():
        saved = optimizer.state_dict()
        saved["state"][0] = bend(saved["state"][0])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert_identical(everything(model, optimizer), before)
    _, plain_optimizer = make(None, "8")
    with pytest.raises(ValueError, match=r"has DTensors \(exp_avg, .*\), but its parameter is a plain tensor"):
        plain_optimizer.load_state_dict(optimizer.state_dict())
    assert not plain_optimizer.state


def save_by_process(folder):
    model, optimizer = make("fsdp", "32")
    train(model, optimizer, range(1))
    torch.save(optimizer.state_dict(), folder / f"rank{dist.get_rank()}.pt")


def load_by_process(folder):
    """What each of four processes saved for itself is not two processes' state."""
    model, optimizer = make("fsdp", "32")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    saved = torch.load(folder / f"rank{dist.get_rank()}.pt", weights_only=False)
    with pytest.raises(ValueError, match=r"is a DTensor placed .*4.*, but its parameter is a DTensor placed .*2"):
        optimizer.load_state_dict(saved)
    assert_identical(everything(model, optimizer), before)


def damaged_file(folder):
    """The whole checkpoint is read into copies, and the optimizer stays as it is if that fails."""
    model, optimizer = make("fsdp", "8")
    train(model, optimizer, range(1))
    before = everything(model, optimizer)
    state = copy.deepcopy(state_dicts(model, optimizer))
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=folder / "checkpoint", planner=LoadPlanner())
    assert_identical(everything(model, optimizer), before)


def test_bad_state_dicts(workers):
    workers.run(2, bad_state_dicts)


def test_files_of_another_number_of_processes(workers, tmp_path):
    workers.run(4, save_by_process, tmp_path)
    workers.run(2, load_by_process, tmp_path)


def test_damaged_file(workers, tmp_path):
    workers.run(2, save, tmp_path, "fsdp", "8")
    for file in (tmp_path / "checkpoint").glob("*.distcp"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
        file.write_bytes(content)
    workers.run(2, damaged_file, tmp_path)
