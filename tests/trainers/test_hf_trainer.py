"""AdEMAMix in the Hugging Face Trainer."""

import shutil

import pytest
import torch

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
from torch_ademamix import AdEMAMix, AdEMAMix8bit
from torch_ademamix.checkpoint import from_bitsandbytes

pytest.importorskip("transformers", reason="needs transformers: pip install 'torch-ademamix[integrations]'")
import hf_trainer
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

pytestmark = pytest.mark.integrations


class WithLoss(torch.nn.Module):
    """What the Trainer takes for a model: it returns its loss."""

    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x, y):
        return {"loss": loss_fn(self.model, x, y)}


def make_trainer(folder, model, arguments=None, **options):
    training_arguments = TrainingArguments(
        output_dir=folder,
        max_steps=UPDATES,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATED,
        train_sampling_strategy="sequential",
        weight_decay=OPTIONS["weight_decay"],
        save_steps=UPDATES // 2,
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **{"max_grad_norm": MAX_NORM, **(arguments or {})},
    )
    return Trainer(model, training_arguments, train_dataset=make_samples(), **options)


def checkpoint(folder, updates):
    """What a checkpoint holds of model, optimizer and scheduler."""
    path = folder / f"checkpoint-{updates}"
    saved = {name: torch.load(path / f"{name}.pt") for name in ("optimizer", "scheduler")}
    return {"model": load_file(path / "model.safetensors"), **saved}


@pytest.mark.first_case
@pytest.mark.parametrize("name", [cls.__name__ for cls in CLASSES])
def test_example_resumes(name, tmp_path):
    """What goes on from a checkpoint ends as the unbroken run does, bit for bit."""

    def run(folder):
        with counted_updates() as updates:
            hf_trainer.main(["--optimizer", name, "--steps", "8", "--out", str(folder)])
        return len(updates)

    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    assert run(unbroken) == 8
    shutil.copytree(unbroken / "checkpoint-4", resumed / "checkpoint-4")
    assert run(resumed) == 4
    assert_identical(checkpoint(resumed, 8), checkpoint(unbroken, 8))
    assert is_quantized(checkpoint(resumed, 8)["optimizer"]) == (name == "AdEMAMix8bit")


@pytest.mark.each_value
@pytest.mark.parametrize("given", ["class", "instance"])
@pytest.mark.parametrize("cls", CLASSES)
def test_equals_a_plain_loop(cls, given, tmp_path):
    """Accumulation, clipping, the scheduler and a resumption; with a class, the Trainer makes groups and optimizer."""

    def make():
        model = WithLoss()
        if given == "class":
            return make_trainer(
                tmp_path, model, optimizer_cls_and_kwargs=(cls, OPTIONS), arguments={"lr_scheduler_type": "linear"}
            )
        optimizer = cls(model.parameters(), **OPTIONS)
        return make_trainer(tmp_path, model, optimizers=(optimizer, make_scheduler(optimizer)))

    expected = plain_loop(cls, decay_biases=given == "instance")
    for resumption in (None, str(tmp_path / f"checkpoint-{UPDATES // 2}")):
        trainer = make()
        trainer.train(resume_from_checkpoint=resumption)
        assert_identical(trainer.model.model.state_dict(), expected.state_dict())
    assert [state["step"].item() for state in trainer.optimizer.state.values()] == [UPDATES] * 4


def test_clipping_by_the_optimizer(tmp_path):
    options = {**OPTIONS, "max_grad_norm": MAX_NORM}
    arguments = {"max_grad_norm": 0.0, "lr_scheduler_type": "linear"}
    trainer = make_trainer(tmp_path, WithLoss(), arguments, optimizer_cls_and_kwargs=(AdEMAMix, options))
    trainer.train()
    expected = plain_loop(AdEMAMix, decay_biases=False)
    torch.testing.assert_close(trainer.model.model.state_dict(), expected.state_dict())


def test_compiled_model(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "aot_eager")  # TrainingArguments sets it for the whole process
    arguments = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = make_trainer(tmp_path, WithLoss(), arguments, optimizer_cls_and_kwargs=(AdEMAMix8bit, OPTIONS))
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    expected = plain_loop(AdEMAMix8bit, decay_biases=False)
    torch.testing.assert_close(trainer.model.model.state_dict(), expected.state_dict())


def test_goes_on_from_bitsandbytes(tmp_path):
    """The Trainer's own "ademamix" is bitsandbytes' class; its options are good for ours, its checkpoint once read."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'torch-ademamix[bitsandbytes]'")
    arguments = {"optim": "ademamix", "optim_args": "t_alpha=4,t_beta3=4,beta3=0.999", "learning_rate": 1e-2}
    theirs = make_trainer(tmp_path, WithLoss(), arguments)
    theirs.train()
    assert type(theirs.optimizer.optimizer).__module__.startswith("bitsandbytes.")
    file = tmp_path / f"checkpoint-{UPDATES // 2}" / "optimizer.pt"
    torch.save(from_bitsandbytes(torch.load(file)), file)

    _, options = Trainer.get_optimizer_cls_and_kwargs(theirs.args)
    ours = make_trainer(tmp_path, WithLoss(), optimizer_cls_and_kwargs=(AdEMAMix, options))
    with counted_updates() as updates:
        ours.train(resume_from_checkpoint=str(file.parent))
    assert len(updates) == UPDATES - UPDATES // 2
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-5 * q.abs().max()
    for group in ours.optimizer.param_groups:
        assert {name: group[name] for name in options if name != "lr"} | {"lr": group["initial_lr"]} == options
