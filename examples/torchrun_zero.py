"""FP8-LM at level O3 over several processes: tensors dealt out whole, 8 bits on the wire. gloo or NCCL:

    torchrun --nproc-per-node 2 examples/torchrun_zero.py

A rank keeps the optimizer's states (E4M3 and scaled FP16) of the matrices that it owns, and every rank
computes with weights on the points of E4M3. Start it again, with any number of processes, and it goes on.
"""

import os
import random
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from fewbit.train import O3, fp8_gradients, low_adamw, lower, tensorwise
from fewbit.train.distributed import Zero

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


def main(device, steps=STEPS, folder=Path("out/torchrun_zero")):
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).to(device)
    lower(model, tensorwise())
    fp8_gradients(model)  # each cast to 8 bits as soon as backward has it
    zero = Zero(model, lambda params: low_adamw("fp8-lm", params, lr=1e-3, weight=O3.weight))
    if found := sorted(folder.glob("*.pt")):
        saved = [torch.load(f, weights_only=True, map_location=device) for f in found]
        model.load_state_dict(saved[0]["model"])
        zero.load_state_dict([part["zero"] for part in saved])

    losses, data = [], batches(rank, device)
    for step in range(steps):
        ids = next(data)
        zero.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if not zero.step() and rank == 0:
            print(f"step {step:4}  skipped by all ranks: NaN or Inf in a gradient")
        losses.append(loss.item())
        if step % 10 == 0 and rank == 0:
            print(f"step {step:4}  loss {losses[-1]:.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    for old in found if rank == 0 else ():  # of another number of ranks
        old.unlink()
    dist.barrier()
    torch.save({"model": model.state_dict(), "zero": zero.state_dict()}, folder / f"{rank}.pt")
    owned = sum(p.numel() for p in zero.mine)
    print(f"rank {rank} of {world} owns {owned} of {sum(p.numel() for p in model.parameters())} parameters")
    return losses


if __name__ == "__main__":
    cuda = torch.cuda.is_available()
    rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if cuda else "gloo")
    main(torch.device("cuda", rank) if cuda else torch.device("cpu"))
    dist.destroy_process_group()
