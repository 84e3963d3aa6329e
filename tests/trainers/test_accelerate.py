"""AdEMAMix in a loop with Accelerate."""

import pickle
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.config import assert_identical
from tests.helpers.trainers import (
    ACCUMULATED,
    BATCH_SIZE,
    CLASSES,
    MAX_NORM,
    OPTIONS,
    UPDATES,
    counted_updates,
    is_quantized,
    loss_fn,
    make_model,
    make_samples,
    make_scheduler,
    plain_loop,
)
from torch_ademamix import AdEMAMix

pytest.importorskip("accelerate", reason="needs Accelerate: pip install 'torch-ademamix[integrations]'")
import accelerate_loop
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

pytestmark = pytest.mark.integrations


def forget_settings():
    """Accelerate keeps those of the first Accelerator for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _settings_of_its_own():
    forget_settings()
    yield
    forget_settings()


def checkpoint(folder):
    """What a checkpoint holds of model, optimizer and scheduler."""
    saved = {name: torch.load(folder / f"{name}.bin") for name in ("optimizer", "scheduler")}
    return {"model": load_file(folder / "model.safetensors"), **saved}


@pytest.mark.each_value
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", [cls.__name__ for cls in CLASSES])
def test_example_resumes(name, precision, tmp_path):
    """What goes on from a checkpoint ends as the unbroken run does, bit for bit."""

    def run(folder):
        forget_settings()
        arguments = ["--optimizer", name, "--precision", precision, "--steps", "8", "--out", str(folder)]
        with counted_updates() as updates:
            accelerate_loop.main(arguments)
        return len(updates)

    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert run(unbroken) == 8
    shutil.copytree(unbroken / "step_000004", resumed / "step_000004")
    assert run(resumed) == 4
    expected = checkpoint(unbroken / "step_000008")
    assert_identical(checkpoint(resumed / "step_000008"), expected)
    assert is_quantized(expected["optimizer"]) == (name == "AdEMAMix8bit")


@pytest.mark.parametrize("cls", CLASSES)
def test_equals_a_plain_loop(cls, tmp_path):
    """Accumulation, clipping, the scheduler, and a resumption of objects that were in use."""
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATED)
    model = make_model()
    optimizer = cls(model.parameters(), **OPTIONS)
    model, optimizer, scheduler, batches = accelerator.prepare(
        model, optimizer, make_scheduler(optimizer), DataLoader(make_samples(), batch_size=BATCH_SIZE)
    )

    def train(batches):
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(loss_fn(model, **batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and scheduler.scheduler.last_epoch == UPDATES // 2:
                accelerator.save_state(tmp_path)

    expected = plain_loop(cls).state_dict()
    train(batches)
    assert_identical(model.state_dict(), expected)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    accelerator.load_state(tmp_path)
    train(accelerator.skip_first_batches(batches, UPDATES // 2 * ACCUMULATED))
    assert_identical(model.state_dict(), expected)


@pytest.mark.parametrize("in_the_op", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_skipped_steps(cls, in_the_op):
    """Gradients that overflow change nothing. Accelerate knows of it where GradScaler itself leaves out the step."""
    Accelerator()
    params, expected = list(make_model().parameters()), list(make_model().parameters())
    optimizer, unscaled = cls(params, **OPTIONS), cls(expected, **OPTIONS)
    if not in_the_op:
        optimizer._step_supports_amp_scaling = False
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerated = AcceleratedOptimizer(optimizer, scaler=scaler)
    for overflow in (False, True, False):
        for p, q in zip(params, expected, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * scaler.scale(torch.ones(()))
        if overflow:
            params[0].grad[0, 0] = torch.inf
        else:
            unscaled.step()
        before = scaler.get_scale()
        accelerated.step()
        assert (scaler.get_scale() < before) == overflow
        assert in_the_op or accelerated.step_was_skipped == overflow
        assert_identical(params, expected)
        assert_identical(optimizer.state_dict()["state"], unscaled.state_dict()["state"])


def test_wrapper_is_pickled():
    Accelerator()
    model = make_model()
    wrapper = AcceleratedOptimizer(AdEMAMix(model.parameters(), **OPTIONS))
    loss_fn(model, torch.ones(1, 64), torch.ones(1, 1)).backward()
    wrapper.step()
    copy = pickle.loads(pickle.dumps(wrapper))
    assert_identical(copy.state_dict(), wrapper.state_dict())
