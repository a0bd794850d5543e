"""Finetune SmolLM2 on a text of yours, with the products of its linear layers in int8 (SwitchBack).

    python examples/finetune_smollm2.py --data mine.txt [--products switchback] [--optimizer stable-adamw]

Run it again after an interruption: it goes on from OUT/state.pt to the same bits. --model takes a folder or a
hub id, too. Other products and optimizers: `fewbit.train.PRODUCTS` (delayed ones want `advance(model)` after
each step) and `fewbit.train.OPTIMIZERS`.
"""

import argparse
import os
from pathlib import Path

import torch

import fewbit
from fewbit.io.source import open_source
from fewbit.train import OPTIMIZERS, PRODUCTS, Guard, lower, restore

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--out", type=Path, default=Path("out/smollm2-finetuned"))
parser.add_argument("--products", choices=sorted({*PRODUCTS} - {"delayed"}), default="switchback")
parser.add_argument("--optimizer", choices=OPTIMIZERS, default="stable-adamw")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
BATCH, LENGTH, RATE = 4, 128, 5e-5

tokenizer = open_source(args.model).tokenizer()
tokens = tokenizer(args.data.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
cut = int(0.95 * len(tokens))
held = tokens[cut:].unfold(0, LENGTH, LENGTH)[:8].to(args.device)


def batch(step: int) -> torch.Tensor:
    """Windows [BATCH, LENGTH] that follow from the step alone, so there is no position to save."""
    starts = torch.randint(cut - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([tokens[i : i + LENGTH] for i in starts]).to(args.device)


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    """Nats per token; what is not in few bits computes in bfloat16."""
    with torch.autocast(args.device, torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


model = lower(fewbit.load(args.model, args.device, torch.float32), PRODUCTS[args.products]())
optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr=RATE, weight_decay=0.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, args.steps, cycle_momentum=False)
guard = Guard(optimizer, max_norm=1.0)  # clips, and leaves out an update with Inf or NaN
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "guard": guard}

args.out.mkdir(parents=True, exist_ok=True)
saved, first = args.out / "state.pt", 0
if saved.exists():
    state = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    first = state["step"]
model.train()
for step in range(first, args.steps):
    loss_of(batch(step)).backward()
    guard.step()
    optimizer.zero_grad()
    schedule.step()
    if (step + 1) % 10 == 0 or step + 1 == args.steps:
        with torch.no_grad():
            print(f"{step + 1}/{args.steps} held out {loss_of(held):.4f}", flush=True)
        torch.save({n: p.state_dict() for n, p in parts.items()} | {"step": step + 1}, f"{saved}.tmp")
        os.replace(f"{saved}.tmp", saved)  # there is a whole file at any moment
restore(model).to(torch.bfloat16).save_pretrained(args.out)
tokenizer.save_pretrained(args.out)
print(f'fewbit generate {args.out} "The capital of France is"')
