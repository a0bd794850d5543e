"""Bytes that a rank sends for a model: bfloat16 against 8 bits, for gradients, FSDP2, ZeRO and sequences.

    python benchmarks/wire_bytes.py        # gloo on this machine, 2 and 4 ranks, half a minute

Counted, not estimated: every collective of one training step goes through `fewbit.train.distributed.Wire`. A
small Llama in bfloat16 (sequence parallel: a norm and a pair of layers) stands for the model, and the numbers
are bytes per parameter, or per element of the activation between two pairs. Prints Markdown for
benchmarks/results/wire_bytes.md.
"""

import multiprocessing as mp
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fewbit.train.distributed import (
    BlockReduceScatter,
    Columns,
    Road,
    Rows,
    Wire,
    Zero,
    attach,
    fp8_gather,
    sync_steps,
)

DEPTH, WIDTH = 2, 256


class Block(nn.Module):
    """A norm and a residual pair of layers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def model(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(DEPTH))).to(dtype)


def numbers(dtype=torch.bfloat16):
    return torch.randn(2, 64, WIDTH).to(dtype)


def gradients(road):
    """One backward of DDP."""
    ddp = DistributedDataParallel(model())
    if road is not None:
        attach(ddp, road=road)
    ddp(numbers()).sum().backward()  # buckets are rebuilt after the first
    with Wire() as wire:
        ddp(numbers()).sum().backward()
    return wire.nbytes / sum(p.numel() for p in ddp.parameters())


def sharded(gather, scatter):
    """One step of FSDP2: weights gathered for forward and backward, gradients scattered."""
    net = model(torch.float32)
    if gather:
        fp8_gather(net)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for module in (*net, net):
        fully_shard(module, mp_policy=policy)
        if scatter:
            module.set_custom_reduce_scatter(BlockReduceScatter())
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    if gather:
        sync_steps(net)
    with Wire() as wire:
        net(numbers()).sum().backward()
        optimizer.step()
        if gather:
            sync_steps(net)
    n = sum(p.numel() for p in net.parameters())
    scattered = sum(c.nbytes for c in wire.calls if c.kind in ("reduce-scatter", "all-to-all")) / n
    return wire.nbytes / n - scattered, scattered


def zero():
    """One step of whole-tensor ZeRO."""
    net = model()
    found = Zero(net, lambda params: torch.optim.SGD(params, lr=1e-3))
    net(numbers()).sum().backward()
    with Wire() as wire:
        found.step()
    return wire.nbytes / sum(p.numel() for p in net.parameters())


def sequence(low):
    """Forward and backward of a pair between parts of a sequence, torch's styles against ours."""
    torch.manual_seed(0)
    block, mesh = Block().to(torch.bfloat16), init_device_mesh("cpu", (dist.get_world_size(),))
    if low:
        styles = {"norm": SequenceParallel(use_local_output=True), "up": Columns(), "down": Rows()}
    else:
        from torch.distributed.tensor import Shard

        styles = {
            "norm": SequenceParallel(), "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }  # fmt: skip
    parallelize_module(block, mesh, styles)
    x = numbers().chunk(dist.get_world_size(), 1)[dist.get_rank()].contiguous().requires_grad_()
    y = block(x)
    with Wire() as wire:
        y = block(x)
        y.sum().backward()
    gathered = sum(c.nbytes for c in wire.calls if c.kind == "all-gather")
    scattered = sum(c.nbytes for c in wire.calls if c.kind == "reduce-scatter")
    return gathered / numbers().numel(), scattered / numbers().numel()


def rows(world):
    """(what, bytes in bfloat16, bytes in 8 bits)."""
    wide = gradients(None)
    for road in (Road.GATHER, Road.TWO_PHASE):
        best = " (chosen)" if road is Road.best(world) else ""
        yield f"gradients, DDP, {road}{best}", wide, gradients(road)
    (gather, scatter), (low, low_scatter) = sharded(False, False), sharded(True, True)
    yield "weights, FSDP2, forward and backward", gather, low
    yield "gradients, FSDP2, blocks of 128", scatter, low_scatter
    yield "gradients and weights, whole-tensor ZeRO", 4 * (world - 1) / world, zero()
    (gather, scatter), (low, low_scatter) = sequence(False), sequence(True)
    yield "activations, sequence parallel, gathers", gather, low
    yield "activations, sequence parallel, scatters", scatter, low_scatter


def work(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = list(rows(world))
    if rank == 0:
        out.put(found)
    dist.barrier()
    dist.destroy_process_group()


def main():
    """Run on 2 and on 4 ranks, print."""
    context = mp.get_context("spawn")
    print("Bytes that a rank sends, for a parameter or an element. `python benchmarks/wire_bytes.py`\n")
    print("| what | ranks | bfloat16 | 8 bits | ratio |\n|---|--:|--:|--:|--:|")
    for world in (2, 4):
        out, store = context.Queue(), tempfile.mktemp()
        ranks = [context.Process(target=work, args=(r, world, store, out), daemon=True) for r in range(world)]
        for process in ranks:
            process.start()
        for what, wide, low in out.get(timeout=200):
            print(f"| {what} | {world} | {wide:.3f} | {low:.3f} | {low / wide:.2f} |", flush=True)
        for process in ranks:
            process.join(20)
    print(
        "\nZeRO's bfloat16 is a reduce-scatter and an all-gather of every parameter. Norms and biases go wide"
    )
    print("in all of them; scatters of sequence parallel layers are sums, which travel wide.")


if __name__ == "__main__":
    main()
