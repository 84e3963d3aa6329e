"""What the optimizer refuses: by which error, in which words, and that nothing has changed then."""

import copy
from functools import partial

import pytest
import torch

from tests.helpers.config import assert_identical
from torch_ademamix import AdEMAMix, AdEMAMix32bit, PagedAdEMAMix, compile_train_step, release_gradients

NAN = float("nan")

# Options of the optimizer, each with what the refusal says.
BAD_OPTIONS = [
    *[({"lr": lr}, "lr is") for lr in (NAN, torch.ones(2), torch.tensor(1))],
    *[
        ({"betas": betas}, r"betas is .* three numbers in \[0, 1\)")
        for betas in (
            *((0.9, 0.999), (0.9, 0.999, 0.9999, 0.99999)),
            *((1.0, 0.9, 0.9), (0.9, -0.1, 0.9), (0.9, 0.9, 1.0), (0.9, NAN, 0.9)),
        )
    ],
    *[({x: -0.1}, f"{x} is -0.1, but must be at least 0") for x in ("alpha", "eps", "weight_decay")],
    *[({x: -100}, f"{x} is -100, but must be at least 0, or None") for x in ("t_alpha", "t_beta3")],
    *[({"schedule_start": value}, "schedule_start is") for value in (-1, 0.5, 2**63)],
    *[({"seed": value}, "seed is .* an int of 64 bits") for value in (2**63, -(2**63) - 1, 1.5, None)],
    *[
        ({x: value}, f"{x} is .* True or False")
        for x in ("maximize", "stochastic_rounding", "capturable", "is_paged")
        for value in ("no", None)
    ],
    *[({"optim_bits": bits}, "optim_bits is .* 8 or 32") for bits in (4, 16, "8")],
    ({"slow_ema_bits": 4}, "slow_ema_bits is 4, but must be 8, 12 or 16"),
    ({"min_8bit_size": -1}, "min_8bit_size is -1, but must be at least 0"),
]
WRONG_TYPES = [
    ({x: "high"}, f"{x} is 'high', but must be") for x in ("lr", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")
] + [({x: torch.ones(2)}, f"{x} is .*, but must be") for x in ("alpha", "eps", "t_beta3", "slow_ema_bits", "maximize")]
WRONG_TYPES += [({"betas": betas}, "betas is .* three numbers") for betas in (0.9, ("a", "b", "c"), None)]
REFUSED_OPTIONS = [(ValueError, *row) for row in BAD_OPTIONS] + [(TypeError, *row) for row in WRONG_TYPES]


def trained_tensor(tensor):
    return tensor.requires_grad_()


@pytest.fixture
def trained():
    """An optimizer of two groups after two steps, with gradients for a third."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (300,), (5,), (4, 4))]
    optimizer = AdEMAMix([{"params": params[:2]}, {"params": params[2:]}])
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    return optimizer


def snapshot(optimizer):
    """All that a refusal may not change."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params, copy.deepcopy(optimizer.state_dict()), dict(optimizer.defaults)


def assert_refused(optimizer, call, error, match):
    before = snapshot(optimizer)
    with pytest.raises(error, match=match):
        call()
    assert_identical(snapshot(optimizer), before)


@pytest.mark.parametrize(("error", "options", "match"), REFUSED_OPTIONS, ids=repr)
def test_options(trained, error, options, match):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    with pytest.raises(error, match=match):
        AdEMAMix([p], **options)
    with pytest.raises(error, match=match):
        AdEMAMix([{"params": [p]}, {"params": [q], **options}])
    assert_refused(trained, lambda: trained.add_param_group({"params": [p], **options}), error, match)
    state_dict = copy.deepcopy(trained.state_dict())
    if not options.keys() & {"optim_bits", "slow_ema_bits", "min_8bit_size", "is_paged"}:  # these aren't loaded
        state_dict["param_groups"][1].update(options)
        assert_refused(trained, lambda: trained.load_state_dict(state_dict), error, match)
        # A scheduler or a user may write to a group at any time; the first group may not have moved then.
        trained.param_groups[1].update(options)
        assert_refused(trained, trained.step, error, match)


@pytest.mark.parametrize(
    ("params", "error", "match"),
    [
        ([1.0], TypeError, "can only optimize Tensors"),
        ([torch.ones(2, requires_grad=True) * 2], ValueError, "non-leaf"),
        (
            [torch.ones(2), trained_tensor(torch.ones(2).to(torch.float8_e4m3fn))],
            ValueError,
            r"\['params'\]\[1\] has dtype torch.float8_e4m3fn",
        ),
        ([trained_tensor(torch.ones(2).to_sparse())], ValueError, r"\['params'\]\[0\] has layout torch.sparse_coo"),
        ([trained_tensor(torch.ones(1).expand(2))], ValueError, r"\['params'\]\[0\] has elements that share memory"),
    ],
)
def test_parameters(trained, params, error, match):
    with pytest.raises(error, match=match):
        AdEMAMix(params)
    with pytest.raises(error, match=match):
        AdEMAMix([{"params": torch.ones(3)}, {"params": params}])
    assert_refused(trained, lambda: trained.add_param_group({"params": params}), error, match)


@pytest.mark.parametrize(("params", "match"), [([], "empty parameter list"), (torch.ones(2), "params argument")])
def test_parameter_lists(params, match):
    with pytest.raises((ValueError, TypeError), match=match):
        AdEMAMix(params)


def test_groups(trained):
    p = trained.param_groups[0]["params"][0]
    for group, error, match in (
        ({"params": [p]}, ValueError, "more than one parameter group"),
        ({"params": {torch.ones(2)}}, TypeError, "ordered collections"),
        ([p], TypeError, "must be a dict"),
    ):
        assert_refused(trained, lambda group=group: trained.add_param_group(group), error, match)


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(
    ("grad", "match"),
    [
        (lambda p: torch.ones_like(p).to_sparse(), "sparse_coo"),
        (lambda p: torch.ones_like(p, dtype=torch.complex64), "complex64"),
        (lambda p: torch.ones_like(p, dtype=torch.int32), "int32"),
    ],
)
def test_gradients(trained, grad, match, group, steps_before):
    if steps_before == 0:
        trained = AdEMAMix([{"params": g["params"]} for g in trained.param_groups])
    p = trained.param_groups[group]["params"][1]
    p.grad_dtype = None  # torch allows other dtypes only so
    p.grad = grad(p)
    assert_refused(trained, trained.step, RuntimeError, match)


def test_stochastic_rounding_of_float16_parameters_set_later():
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3).half())]
    optimizer = AdEMAMix([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[1]["param_rounding"] = "stochastic"
    assert_refused(optimizer, optimizer.step, ValueError, r"param_groups\[1\]\['params'\]\[0\] has dtype torch.float16")


def edit_state(change):
    return lambda state_dict: change(state_dict["state"][2])


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        *[
            (edit_state(lambda s, x=x: s.update({x: torch.zeros(6)})), rf"\[2\]\['{x}'\] has shape \[6\]")
            for x in ("exp_avg", "exp_avg_slow", "exp_avg_sq", "step")
        ],
        *[
            (edit_state(lambda s, x=x: s.update({x: s[x].bfloat16()})), rf"\[2\]\['{x}'\] has dtype torch.bfloat16")
            for x in ("exp_avg", "exp_avg_slow", "exp_avg_sq")
        ],
        *[
            (
                edit_state(lambda s, x=x: s.update(step=torch.tensor(x))),
                rf"\[2\]\['step'\] is {x:g}, but must be finite",
            )
            for x in (-1.0, NAN, float("inf"))
        ],
        (edit_state(lambda s: s.update(exp_avg=[0.0] * 5)), r"\[2\]\['exp_avg'\] is a list"),
        (
            edit_state(lambda s: s.update(exp_avg=s["exp_avg"].to_sparse())),
            r"\['exp_avg'\] has layout torch.sparse_coo",
        ),
        (lambda d: d["state"].update({2: [1.0]}), r"\[2\] is a list, but must be a dict"),
        (edit_state(lambda s: s.pop("exp_avg_slow")), r"\[2\] has entries \['exp_avg', 'exp_avg_sq', 'step'\]"),
        (edit_state(lambda s: s.update(exp_avg_fast=s["exp_avg"])), r"\[2\] has entries .*exp_avg_fast.*from_apple"),
        (edit_state(lambda s: s.clear()), r"\[2\] has entries \[\]"),
        (lambda d: d["param_groups"][1]["params"].append(4), "doesn't match the size"),
        (lambda d: d["param_groups"].pop(), "different number of parameter groups"),
    ],
)
def test_state_dicts(trained, edit, match):
    state_dict = copy.deepcopy(trained.state_dict())
    for state in state_dict["state"].values():
        state["exp_avg"] += 1
    edit(state_dict)
    assert_refused(trained, lambda: trained.load_state_dict(state_dict), ValueError, match)


def test_fixed_arguments():
    with pytest.raises(TypeError, match="optim_bits"):
        AdEMAMix32bit([torch.ones(2)], optim_bits=8)
    with pytest.raises(TypeError, match="is_paged"):
        PagedAdEMAMix([torch.ones(2)], is_paged=False)


def test_learning_rates_below_0(trained):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"lr is -0.001, but must be at least 0"):
        AdEMAMix([p], lr=-1e-3)
    add = partial(trained.add_param_group, {"params": [p], "lr": -1e-3})
    assert_refused(trained, add, ValueError, "lr is -0.001, but must be at least 0")


@pytest.mark.parametrize("make_tensor", [float, lambda lr: torch.tensor([lr])], ids=["float", "tensor"])
def test_a_schedule_may_round_to_below_zero(make_tensor):
    """LinearLR to 0 in four steps ends at -2e-20."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdEMAMix([p], lr=make_tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=4)
    for _ in range(6):
        p.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert p.isfinite().all()


@pytest.mark.parametrize("wrap", [compile_train_step, release_gradients])
def test_wrapped_optimizers(wrap):
    """As Accelerate makes them."""
    model = torch.nn.Linear(2, 2)
    arguments = (model, torch.optim.SGD(model.parameters()), *([lambda model: 0] if wrap is compile_train_step else []))
    with pytest.raises(TypeError, match="optimizer is a SGD, but must be an AdEMAMix"):
        wrap(*arguments)
