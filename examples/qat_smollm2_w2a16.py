"""Train SmolLM2 with 2-bit weights in the loop, against its float self: steps and zeros are learned, too.

python examples/qat_smollm2_w2a16.py --data mine.txt [--steps 30]        (again: it goes on, to the same bits)
"""

import argparse
import os
from pathlib import Path

import torch

import fewbit
from fewbit.io.attached import make_saveable
from fewbit.io.source import open_source
from fewbit.train import Guard, LearnedRange, convert, kd_loss, prepare

parser = argparse.ArgumentParser()
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--model", default="smollm2")
parser.add_argument("--out", type=Path, default=Path("out/smollm2-w2a16"))
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
BATCH, LENGTH, RATE = 4, 128, 2e-4

tokenizer = open_source(args.model).tokenizer()
tokens = tokenizer(args.data.read_text(), return_tensors="pt", verbose=False)["input_ids"][0]
cut = int(0.95 * len(tokens))
held = tokens[cut:].unfold(0, LENGTH, LENGTH)[:8].to(args.device)


def batch(step: int) -> torch.Tensor:
    """Windows [BATCH, LENGTH] that follow from the step alone, so there is no position to save."""
    starts = torch.randint(cut - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([tokens[i : i + LENGTH] for i in starts]).to(args.device)


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    """KL(float model || this one), nats per token: it says more of a token than the text does."""
    with torch.autocast(args.device, torch.bfloat16):
        with torch.no_grad():
            wanted = teacher.base_model(ids).last_hidden_state.float()
        return kd_loss(
            model.base_model(ids).last_hidden_state.float(), wanted, model.lm_head, teacher.lm_head
        )


recipe = fewbit.recipes.rtn(bits=2, group_size=64, symmetric=False)
teacher = fewbit.load(args.model, args.device, torch.float32).requires_grad_(False)
model = prepare(fewbit.load(args.model, args.device, torch.float32), recipe, weight=LearnedRange())
model.get_input_embeddings().requires_grad_(False)  # and the head that is tied to it: as the teacher's
print(f"rounded {loss_of(held).item():.4f}")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0)
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
make_saveable(convert(model).to(torch.bfloat16)).save_pretrained(args.out)  # codes, with their steps
tokenizer.save_pretrained(args.out)
print(f"fewbit eval {args.out} --against {args.model}")
