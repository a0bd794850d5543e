"""Pretrain a small Llama in FP8 from nothing: products, optimizer states and gradients in 8 bits.

    python examples/pretrain_small_llama.py --data shakespeare.txt [--products rowwise] [--steps 300]

Run it again after an interruption: it goes on from OUT/state.pt to the same bits. Some minutes on two cores;
on a GPU the products use its FP8 units.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.train import LEVELS, PRODUCTS, Guard, lower, restore

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, required=True)
parser.add_argument("--out", type=Path, default=Path("out/small-llama"))
parser.add_argument("--products", choices=sorted({*PRODUCTS} - {"delayed"}), default="rowwise")
parser.add_argument("--level", choices=LEVELS, default="O2")
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
args = parser.parse_args()
LENGTH = 128

tokens = torch.tensor(list(args.data.read_bytes()))  # a token for each byte
cut = int(0.95 * len(tokens))
held = tokens[cut:].unfold(0, LENGTH, LENGTH)[:64].to(args.device)


def batch(step: int) -> torch.Tensor:
    """Windows [batch, LENGTH] that follow from the step alone, so there is no position to save."""
    starts = torch.randint(cut - LENGTH, (args.batch,), generator=torch.Generator().manual_seed(step))
    return torch.stack([tokens[i : i + LENGTH] for i in starts]).to(args.device)


def loss_of(ids: torch.Tensor) -> torch.Tensor:
    """Nats per byte; what is not in few bits computes in bfloat16."""
    with torch.autocast(args.device, torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
model = lower(LlamaForCausalLM(config).to(args.device), PRODUCTS[args.products]())
optimizer = LEVELS[args.level].optimizer(model, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps, cycle_momentum=False)
guard = Guard(optimizer, max_norm=1.0)  # clips, and leaves out an update with Inf or NaN
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "guard": guard}

args.out.mkdir(parents=True, exist_ok=True)
saved, first = args.out / "state.pt", 0
if saved.exists():
    state = torch.load(saved, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])
    first = state["step"]
model.train()
for step in range(first, args.steps):
    loss_of(batch(step)).backward()
    guard.step()
    optimizer.zero_grad()
    schedule.step()
    if (step + 1) % 20 == 0 or step + 1 == args.steps:
        with torch.no_grad():
            print(f"{step + 1}/{args.steps} held out {loss_of(held):.4f}", flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"random": torch.get_rng_state(), "step": step + 1}
        torch.save(state, saved.with_suffix(".tmp"))
        os.replace(saved.with_suffix(".tmp"), saved)  # there is a whole file at any moment
restore(model).save_pretrained(args.out)
print(f"the model is in {args.out}: an ordinary Llama in float32")
