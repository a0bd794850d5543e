"""Tensor and sequence parallel layers whose activations travel in 8 bits. gloo or NCCL:

    torchrun --nproc-per-node 2 examples/torchrun_parallel.py

Every rank reads the whole batch, keeps its part of the sequence between the pairs of layers, and its part of
the features inside them.
"""

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from fewbit.train import lower, tensorwise
from fewbit.train.distributed import Columns, Rows

STEPS, CONTEXT, BATCH = 40, 64, 4


class Block(nn.Module):
    """A residual feed-forward pair."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def batches(device):
    """Bytes of a text that is on every machine, the same for every rank."""
    text = torch.tensor(list(Path(random.__file__).read_bytes()))
    made = torch.Generator().manual_seed(0)
    while True:
        at = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=made)
        yield torch.stack([text[i : i + CONTEXT + 1] for i in at]).to(device)


def main(device, steps=STEPS):
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(64), Block(64)).to(device)
    embed, head = nn.Embedding(256, 64).to(device), nn.Linear(64, 256).to(device)
    lower(blocks, tensorwise())  # FP8 products; plain linear layers serve as well
    for block in blocks:
        styles = {"norm": SequenceParallel(use_local_output=True), "up": Columns(), "down": Rows()}
        parallelize_module(block, mesh, styles)
    params = [*blocks.parameters(), *embed.parameters(), *head.parameters()]
    # `foreach` does not mix sharded and plain parameters
    optimizer = torch.optim.AdamW(params, lr=2e-3, foreach=False)

    losses, data = [], batches(device)
    for step in range(steps):
        ids = next(data)
        mine, wanted = (t.chunk(world, 1)[rank] for t in (ids[:, :-1], ids[:, 1:]))
        optimizer.zero_grad()
        logits = head(blocks(embed(mine)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()) / world
        loss.backward()
        for p in (*embed.parameters(), *head.parameters()):  # every rank saw its part of the sequence
            dist.all_reduce(p.grad)
        optimizer.step()
        dist.all_reduce(loss)
        losses.append(loss.item())
        if step % 10 == 0 and rank == 0:
            print(f"step {step:4}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    main(torch.device("cuda", rank) if cuda else torch.device("cpu"))
    dist.destroy_process_group()
