"""Trains a small Llama on bytes with the Hugging Face Trainer and AdEMAMix.

    python examples/hf_trainer.py
    python examples/hf_trainer.py --optimizer AdEMAMix8bit --out out/hf_trainer_8bit

Stopped and started again, it goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch
from byte_gpt import VOCABULARY, standard_library
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import torch_ademamix

CONTEXT = 128
BATCH_SIZE = 8
ACCUMULATED = 2  # batches per update


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
        )
    )


def make_trainer(args: argparse.Namespace) -> Trainer:
    text, _ = standard_library()
    windows = text.unfold(0, CONTEXT, CONTEXT)[: args.steps * ACCUMULATED * BATCH_SIZE].long()  # one epoch
    training_arguments = TrainingArguments(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=BATCH_SIZE,
        gradient_accumulation_steps=ACCUMULATED,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.1,  # of matrices: the Trainer makes a second group, without decay, of norms and biases
        max_grad_norm=1.0,
        save_steps=args.steps // 2,
        logging_steps=args.steps // 4,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=args.seed,
    )
    optimizer_class = getattr(torch_ademamix, args.optimizer)
    # The learning rate too: the Trainer's learning_rate is for the optimizers that it creates itself.
    options = {"lr": 2e-3, **torch_ademamix.recommended(args.steps)}  # steps are updates, as max_steps
    set_seed(args.seed)
    return Trainer(
        make_model(),
        training_arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        optimizer_cls_and_kwargs=(optimizer_class, options),
    )


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="AdEMAMix", help="the name of a class of torch_ademamix")
    parser.add_argument("--steps", type=int, default=200, help="updates; at least 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/hf_trainer"), help="the folder of the checkpoints")
    args = parser.parse_args(arguments)
    trainer = make_trainer(args)
    checkpoint = get_last_checkpoint(args.out) if args.out.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


if __name__ == "__main__":
    main()
