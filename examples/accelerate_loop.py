"""Trains a byte-level GPT in a loop of its own, with Accelerate and AdEMAMix.

    python examples/accelerate_loop.py
    accelerate launch examples/accelerate_loop.py --optimizer AdEMAMix8bit --precision bf16

Stopped and started again, it goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from byte_gpt import ByteGPT, loss_fn, standard_library
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import torch_ademamix

CONTEXT = 64
BATCH_SIZE = 8
ACCUMULATED = 2  # batches per update


def main(arguments: list[str] | None = None) -> ByteGPT:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="AdEMAMix", help="the name of a class of torch_ademamix")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], default="no", help="fp16 needs a GPU")
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/accelerate_loop"), help="the folder of the checkpoints")
    args = parser.parse_args(arguments)

    accelerator = Accelerator(
        mixed_precision=args.precision,
        gradient_accumulation_steps=ACCUMULATED,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the same order after a resumption
    )
    set_seed(args.seed)
    model = ByteGPT("tiny", CONTEXT)
    optimizer_class = getattr(torch_ademamix, args.optimizer)
    optimizer = optimizer_class(
        model.parameters(),
        lr=2e-3,
        weight_decay=0.1,
        **torch_ademamix.recommended(args.steps),  # updates, not batches
    )
    # Accelerate steps the scheduler once per update and process.
    scheduler = CosineAnnealingLR(optimizer, args.steps * accelerator.num_processes)
    text, _ = standard_library()
    samples = args.steps * ACCUMULATED * BATCH_SIZE * accelerator.num_processes  # one epoch
    windows = text.unfold(0, CONTEXT + 1, CONTEXT)[:samples].long()
    batches = DataLoader(windows, batch_size=BATCH_SIZE, shuffle=True)
    model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)

    done = 0  # updates
    if checkpoints := sorted(args.out.glob("step_*")):
        accelerator.load_state(checkpoints[-1])
        done = int(checkpoints[-1].name.removeprefix("step_"))
        batches = accelerator.skip_first_batches(batches, done * ACCUMULATED)

    for tokens in batches:
        with accelerator.accumulate(model):
            loss = loss_fn(model, tokens)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            if done % max(args.steps // 4, 1) == 0:
                accelerator.print(f"step {done}: loss {loss.item():.3f}")
            if done % max(args.steps // 2, 1) == 0:
                accelerator.save_state(args.out / f"step_{done:06}")
    return model


if __name__ == "__main__":
    main()
