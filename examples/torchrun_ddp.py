"""Replicated training with gradients in 8 bits on the wire. Runs on CPUs (gloo) and on GPUs (NCCL):

    torchrun --nproc-per-node 2 examples/torchrun_ddp.py

Only the lines marked with FP8 differ from plain DistributedDataParallel. Start it again and it goes on.
"""

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.train.distributed import attach

STEPS, CONTEXT, BATCH = 40, 64, 4
SMALL = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)


def batches(rank, device):
    """Bytes of a text that is on every machine, other ones for every rank."""
    text = torch.tensor(list(Path(random.__file__).read_bytes()))
    made = torch.Generator().manual_seed(rank)
    while True:
        at = torch.randint(len(text) - CONTEXT, (BATCH,), generator=made)
        yield torch.stack([text[i : i + CONTEXT] for i in at]).to(device)


def main(device, steps=STEPS, checkpoint=Path("out/torchrun_ddp.pt")):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).to(device)
    ddp = DistributedDataParallel(model)
    fp8 = attach(ddp)  # FP8: shared steps, and a factor mu for each matrix
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        fp8.load_state_dict(saved["fp8"])  # FP8: mu goes on where it was
        first = saved["steps"]

    losses, data = [], batches(dist.get_rank(), device)
    for step in range(first, first + steps):
        ids = next(data)
        optimizer.zero_grad()
        loss = ddp(input_ids=ids, labels=ids).loss
        loss.backward()
        if fp8.finite():  # FP8: False on all ranks where one of them met NaN or Inf
            optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step:4}  loss {losses[-1]:.3f}  mu {fp8.mu.min():.3f} to {fp8.mu.max():.3f}")
    if dist.get_rank() == 0:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "fp8": fp8.state_dict()}
        torch.save(state | {"steps": first + steps}, checkpoint)
        print(f"{first + steps} steps, {fp8.skipped} skipped; saved {checkpoint}")
    return losses


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    main(torch.device("cuda", rank) if cuda else torch.device("cpu"))
    dist.destroy_process_group()
