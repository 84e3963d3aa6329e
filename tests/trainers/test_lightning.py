"""AdEMAMix in Lightning."""

import shutil
from math import inf

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
    SCALER,
    counted_updates,
    is_quantized,
    loss_fn,
    make_model,
    make_samples,
    make_scheduler,
    plain_loop,
)
from torch_ademamix import AdEMAMix

pytest.importorskip("lightning", reason="needs Lightning: pip install 'torch-ademamix[integrations]'")
import lightning as L
import lightning_fit
from lightning.pytorch.plugins import MixedPrecision

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore::Warning:lightning")]


class Automatic(L.LightningModule):
    def __init__(self, cls, **options):
        super().__init__()
        self.model, self.cls, self.options = make_model(), cls, {**OPTIONS, **options}

    def training_step(self, batch, index):
        return loss_fn(self.model, **batch)

    def configure_optimizers(self):
        optimizer = self.cls(self.parameters(), **self.options)
        return [optimizer], [{"scheduler": make_scheduler(optimizer), "interval": "step"}]


class Manual(Automatic):
    automatic_optimization = False

    def training_step(self, batch, index):
        optimizer = self.optimizers()
        self.manual_backward(loss_fn(self.model, **batch) / ACCUMULATED)
        if (index + 1) % ACCUMULATED == 0:
            self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()
            optimizer.zero_grad()


CLIPPING = {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": MAX_NORM}


def make_trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def make_batches():
    return DataLoader(make_samples(), batch_size=BATCH_SIZE)


@pytest.mark.first_case
@pytest.mark.parametrize("name", [cls.__name__ for cls in CLASSES])
def test_example_resumes(name, tmp_path):
    """What goes on from a checkpoint ends as the unbroken run does, bit for bit."""

    def run(folder):
        with counted_updates() as updates:
            lightning_fit.main(["--optimizer", name, "--steps", "8", "--out", str(folder)])
        return len(updates)

    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert run(unbroken) == 8
    resumed.mkdir()
    shutil.copy(unbroken / "epoch=01.ckpt", resumed)
    assert run(resumed) == 4
    actual, expected = (torch.load(folder / "epoch=03.ckpt") for folder in (resumed, unbroken))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_identical(actual[part], expected[part])
    assert is_quantized(expected["optimizer_states"][0]) == (name == "AdEMAMix8bit")


@pytest.mark.parametrize("kind", [Automatic, Manual])
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_a_plain_loop(cls, kind):
    """Accumulation, clipping and the scheduler, by Lightning and by hand."""
    module = kind(cls)
    options = CLIPPING if kind is Automatic else {}
    make_trainer(**options, enable_checkpointing=False).fit(module, make_batches())
    assert_identical(module.model.state_dict(), plain_loop(cls).state_dict())


# By its name alone, Lightning takes bfloat16 for float16 on the CPU.
PRECISIONS = {
    torch.bfloat16: lambda: {"precision": "bf16-mixed"},
    torch.float16: lambda: {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **SCALER))},
}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_mixed_precision(cls, dtype):
    module = Automatic(cls)
    options = {"accumulate_grad_batches": ACCUMULATED, "enable_checkpointing": False}
    make_trainer(**options, **PRECISIONS[dtype]()).fit(module, make_batches())
    assert_identical(module.model.state_dict(), plain_loop(cls, max_norm=inf, autocast=dtype).state_dict())


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
class TestClippingUnderMixedPrecision:
    """Lightning refuses its own where GradScaler leaves unscaling to the step."""

    def train(self, module, dtype, **options):
        make_trainer(enable_checkpointing=False, **PRECISIONS[dtype](), **options).fit(module, make_batches())
        return module.model.state_dict()

    def test_refused(self, dtype):
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            self.train(Automatic(AdEMAMix), dtype, **CLIPPING)

    def test_by_lightning(self, dtype):
        class Unscaled(AdEMAMix):
            _step_supports_amp_scaling = False

        actual = self.train(Automatic(Unscaled), dtype, **CLIPPING)
        assert_identical(actual, plain_loop(AdEMAMix, autocast=dtype).state_dict())

    def test_by_the_optimizer(self, dtype):
        module = Automatic(AdEMAMix, max_grad_norm=MAX_NORM)
        actual = self.train(module, dtype, accumulate_grad_batches=ACCUMULATED)
        torch.testing.assert_close(actual, plain_loop(AdEMAMix, autocast=dtype).state_dict())
        assert module.optimizers().grad_norm > MAX_NORM


@pytest.mark.parametrize("cls", CLASSES)
def test_fabric(cls, tmp_path):
    """A loop with Fabric, and its resumption, equal the plain one."""
    fabric = L.Fabric(accelerator="cpu")
    model = make_model()
    model, optimizer = fabric.setup(model, cls(model.parameters(), **OPTIONS))
    scheduler = make_scheduler(optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    def train(batches):
        for i, batch in enumerate(batches, 1):
            fabric.backward(loss_fn(model, **batch) / ACCUMULATED)
            if i % ACCUMULATED == 0:
                fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    batches = list(make_batches())
    half = len(batches) // 2
    train(batches[:half])
    fabric.save(tmp_path / "checkpoint", parts)
    expected = plain_loop(cls).state_dict()
    for _ in range(2):
        train(batches[half:])
        assert_identical(model.module.state_dict(), expected)
        fabric.load(tmp_path / "checkpoint", parts)
