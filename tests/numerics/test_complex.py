"""Complex parameters train as pairs of reals, bit for bit; their state is complex, as that of torch.optim's AdamW."""

import io

import pytest
import torch
from torch import nn

from tests.helpers.config import assert_identical
from tests.helpers.loops import plain
from tests.helpers.spectral import Spectral, assert_same_training, inputs, loss_fn
from torch_ademamix import AdEMAMix, ReferenceAdEMAMix, ademamix, release_gradients
from torch_ademamix.checkpoint import from_adamw

OPTIONS = {
    "32-bit": {"t_alpha": 5, "t_beta3": 5},
    "beta1 = 0": {"betas": (0, 0.99, 0.999)},
    "clipped": {"max_grad_norm": 0.1, "maximize": True},
}
NAMES = {"step", "exp_avg", "exp_avg_slow", "exp_avg_sq"}


def train(model, optimizer, steps=range(3)):
    step = plain(model, optimizer, loss_fn)
    for i in steps:
        step(inputs(i))


def trained(**options):
    model = Spectral()
    optimizer = AdEMAMix(model.parameters(), lr=0.05, **options)
    train(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("separate", [False, True])
def test_pairs_of_reals(options, separate):
    model = Spectral()
    twin = model.as_reals()
    optimizers = [AdEMAMix(m.parameters(), lr=0.05, **options) for m in (model, twin)]
    if separate:  # state of other memory than arenas
        optimizers[0].init_state()
        for p in model.parameters():
            optimizers[0].state[p]["exp_avg_sq"] = optimizers[0].state[p]["exp_avg_sq"].clone()
    for m, o in zip((model, twin), optimizers, strict=True):
        train(m, o)
    assert_same_training(model, optimizers[0], twin, optimizers[1])
    assert optimizers[0].grad_norm is None or optimizers[0].grad_norm == optimizers[1].grad_norm


def test_reference():
    model = Spectral()
    twin = model.as_reals()
    optimizers = [ReferenceAdEMAMix(m.parameters(), lr=0.05, betas=(0.9, 0.99, 0.999)) for m in (model, twin)]
    for m, o in zip((model, twin), optimizers, strict=True):
        train(m, o)
    assert_same_training(model, optimizers[0], twin, optimizers[1])


def test_functional():
    generator = torch.Generator().manual_seed(0)
    p, grad = (torch.randn(3, 4, dtype=torch.complex64, generator=generator) for _ in range(2))
    moments = [torch.zeros_like(p) for _ in range(3)]
    reals = [torch.view_as_real(t).clone() for t in (p, grad.conj().resolve_conj(), *moments)]
    options = dict(lr=0.1, beta1=0.9, beta2=0.999, beta3=0.9999, alpha=5.0, eps=1e-8, weight_decay=0.1)
    version = p._version
    for lists in ((p, grad.conj(), *moments), reals):
        ademamix(*([t] for t in lists), [torch.zeros(())], **options)
    assert_identical([torch.view_as_real(t) for t in (p, *moments)], [reals[0], *reals[2:]])
    assert p._version > version  # a backward pass notices


def test_state():
    model, optimizer = trained()
    for p in model.parameters():
        state = optimizer.state[p]
        assert state.keys() == NAMES
        for name in NAMES - {"step"}:
            assert (state[name].dtype, state[name].shape) == (p.dtype, p.shape)
            assert_identical(optimizer.ema(p, name), state[name].clone())
    dense = optimizer.state[model.matrix]["exp_avg"], model.matrix
    assert dense[0].stride() == dense[1].stride()
    arenas = {t.untyped_storage().data_ptr() for state in optimizer.state.values() for t in state.values()}
    assert len(arenas) == 3 * 4  # complex64, complex128 and float32 ones

    values = torch.full((4, 5), 1 + 2j)
    optimizer.set_ema(model.matrix, "exp_avg_slow", values)
    assert_identical(optimizer.ema(model.matrix, "exp_avg_slow"), values)


@pytest.mark.parametrize("begun", [False, True])
def test_state_dict(begun):
    model, optimizer = trained()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved, saved_state = torch.load(file)
    other = Spectral()
    resumed = AdEMAMix(other.parameters(), lr=0.1)
    if begun:
        train(other, resumed, range(1))
    other.load_state_dict(saved)
    resumed.load_state_dict(saved_state)
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(3, 6))
    assert_identical(list(other.parameters()), list(model.parameters()))
    assert_identical(resumed.state_dict(), optimizer.state_dict())


def test_from_adamw():
    model = Spectral()
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # AdamW can't take autograd's, which may be lazy conjugates
    adamw.step()
    optimizer = AdEMAMix(model.parameters())
    optimizer.load_state_dict(from_adamw(adamw.state_dict()))
    for p in model.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            assert_identical(optimizer.state[p][name].clone(), adamw.state[p][name].clone())


def test_separate_state():
    _, optimizer = trained()
    before = {p: {name: t.clone() for name, t in state.items()} for p, state in optimizer.state.items()}
    optimizer.separate_state()
    assert_identical([dict(optimizer.state[p]) for p in before], list(before.values()))


def test_gradient_release():
    (model, optimizer), (released, other) = trained(), trained()
    handle = release_gradients(released, other)
    train(model, optimizer)
    for i in range(3):
        released(inputs(i)).backward()
        other.step()
    handle.remove()
    assert_identical(list(released.parameters()), list(model.parameters()))
    assert_identical(other.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"optim_bits": 8, "min_8bit_size": 4}, r"optim_bits is 8, which is for real .* own with optim_bits=32"),
        ({"master_weights": "remainder"}, r"master_weights is 'remainder'.* own with master_weights=None"),
        ({"param_rounding": "stochastic"}, r"param_rounding is 'stochastic'.* own with param_rounding='nearest'"),
    ],
)
def test_options_of_real_parameters(options, match):
    p = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\]\[0\].*{match}|{match}"):
        AdEMAMix([p], **options)
    AdEMAMix([{"params": [p]}, {"params": [nn.Parameter(torch.ones(8).bfloat16())], **options}])


def test_small_complex_parameters_beside_quantized_ones():
    p, q = nn.Parameter(torch.ones(4, dtype=torch.complex64)), nn.Parameter(torch.ones(5000))
    optimizer = AdEMAMix([p, q], optim_bits=8)
    optimizer.init_state()
    assert [optimizer.state[t]["exp_avg"].dtype for t in (p, q)] == [torch.complex64, torch.int8]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_errors():
    p = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"is a lazy conjugate of another tensor; pass a parameter of p\.resolve_conj"):
        AdEMAMix([torch.ones(4, dtype=torch.complex64).conj().requires_grad_()])
    with pytest.raises(ValueError, match=r"has dtype torch\.complex32; allowed are"):
        AdEMAMix([torch.ones(4, dtype=torch.complex64).to(torch.complex32).requires_grad_()])
    optimizer = AdEMAMix([p])
    p.grad_dtype = None
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"has dtype torch\.float32; allowed are torch\.complex64, "):
        optimizer.step()
    assert not optimizer.state

    real = nn.Parameter(torch.ones(4))
    quantized = AdEMAMix([real], optim_bits=8, min_8bit_size=0)
    quantized.init_state()
    with pytest.raises(ValueError, match=r"is quantized, but the state of a complex parameter can't be"):
        optimizer.load_state_dict(quantized.state_dict())
    unquantized = AdEMAMix([real])
    unquantized.init_state()
    with pytest.raises(ValueError, match=r"has dtype torch.float32, but must .*torch.complex64"):
        optimizer.load_state_dict(unquantized.state_dict())
