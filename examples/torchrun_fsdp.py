"""Sharded training (FSDP2) with FP8 products, weights gathered and gradients reduced in 8 bits. gloo or NCCL:

    torchrun --nproc-per-node 2 examples/torchrun_fsdp.py

Only the lines marked with FP8 differ from plain FSDP2.
"""

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import save
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.train import lower, tensorwise
from fewbit.train.distributed import BlockReduceScatter, fp8_gather, sync_steps

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


def main(device, steps=STEPS, checkpoint=Path("out/torchrun_fsdp")):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).to(device)
    lower(model, tensorwise())  # FP8: products of the linear layers
    fp8_gather(model)  # FP8: what fully_shard gathers
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    for module in (*model.model.layers, model):
        module.set_custom_reduce_scatter(BlockReduceScatter())  # FP8: gradients, in blocks of 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda *_: sync_steps(model))  # FP8: one all-reduce for all steps

    losses, data = [], batches(dist.get_rank(), device)
    for step in range(steps):
        ids = next(data)
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 and dist.get_rank() == 0:
            print(f"step {step:4}  loss {losses[-1]:.3f}")
    save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=checkpoint)
    if dist.get_rank() == 0:
        print(f"{steps} steps; saved {checkpoint}, which any number of ranks can load")
    return losses


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    main(torch.device("cuda", rank) if cuda else torch.device("cpu"))
    dist.destroy_process_group()
