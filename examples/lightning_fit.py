"""Trains a byte-level GPT with Lightning and AdEMAMix.

    python examples/lightning_fit.py
    python examples/lightning_fit.py --optimizer AdEMAMix8bit --precision bf16-mixed

Stopped and started again, it goes on from its last checkpoint.
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from byte_gpt import ByteGPT, loss_fn, standard_library
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import torch_ademamix

CONTEXT = 64
BATCH_SIZE = 8
ACCUMULATED = 2  # batches per update
EPOCHS = 4


class Training(L.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.model = ByteGPT("tiny", CONTEXT)
        self.optimizer_class = getattr(torch_ademamix, optimizer)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = loss_fn(self.model, tokens)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        updates = int(self.trainer.estimated_stepping_batches)
        optimizer = self.optimizer_class(
            self.parameters(),
            lr=2e-3,
            weight_decay=0.1,
            **torch_ademamix.recommended(updates),
        )
        scheduler = CosineAnnealingLR(optimizer, updates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(arguments: list[str] | None = None) -> Training:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="AdEMAMix", help="the name of a class of torch_ademamix")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--steps", type=int, default=200, help=f"updates; a multiple of {EPOCHS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lightning_fit"), help="the folder of the checkpoints")
    args = parser.parse_args(arguments)

    L.seed_everything(args.seed, verbose=False)
    module = Training(args.optimizer)
    text, _ = standard_library()
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)[: args.steps // EPOCHS * ACCUMULATED * BATCH_SIZE].long()
    # Shuffled once, and saved at the ends of epochs: Lightning's checkpoints hold no random state.
    batches = DataLoader(windows[torch.randperm(len(windows))], batch_size=BATCH_SIZE)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=ACCUMULATED,
        precision=args.precision,
        callbacks=[ModelCheckpoint(args.out, filename="{epoch:02}", save_top_k=-1)],
        default_root_dir=args.out,
        logger=False,
    )
    checkpoints = sorted(args.out.glob("*.ckpt"))
    trainer.fit(module, batches, ckpt_path=checkpoints[-1] if checkpoints else None)
    return module


if __name__ == "__main__":
    main()
