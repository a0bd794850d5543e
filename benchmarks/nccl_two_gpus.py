"""What a machine with two GPUs shows of 8-bit communication: equal to one process, bytes, milliseconds.

    python benchmarks/nccl_two_gpus.py            # two CUDA devices, NCCL; about a minute
    python benchmarks/nccl_two_gpus.py --cpu      # the same on gloo, small: a rehearsal without GPUs

Prints a Markdown table for benchmarks/results/nccl_two_gpus.md. Fails fast: the first row that does not hold
ends all processes with exit code 1, and so does a collective that hangs for a minute. Each claim is compared
with the same arithmetic in one process, or with float32; all ranks must hold the same bits.
"""

import argparse
import datetime
import multiprocessing as mp
import os
import queue
import statistics
import sys
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fewbit.train import fake, low_adamw
from fewbit.train.distributed import (
    E4M3,
    E5M2,
    BlockReduceScatter,
    Columns,
    Road,
    Rows,
    Wire,
    Zero,
    attach,
    fp8_gather,
    mean,
    native_sum,
    sync_steps,
)
from fewbit.train.fake import Identity

WORLD = 2


def relative(a, b):
    """|a - b| / |b|."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def same(tensors, what):
    """Raise unless all ranks hold the same bits."""
    flat = torch.cat([t.detach().reshape(-1).float() for t in tensors])
    rows = [torch.empty_like(flat) for _ in range(WORLD)]
    dist.all_gather(rows, flat)
    assert all(torch.equal(rows[0].nan_to_num(7.0), r.nan_to_num(7.0)) for r in rows), f"{what}: ranks differ"


def timed(call, device, repeats):
    """Median milliseconds."""
    found = []
    for i in range(repeats + 3):
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found += [1e3 * (time.perf_counter() - start)] if i >= 3 else []
    return statistics.median(found)


# -- rows: (what, value, must hold)


def sums(rank, device, n, repeats):
    """The mean of a gradient, road by road."""
    given = [torch.randn(n, generator=torch.Generator().manual_seed(r)) for r in range(WORLD)]
    wanted, g, mu = torch.stack(given).mean(0), given[rank].to(device), torch.full((1,), 0.5).double()
    mu = mu.to(device)
    codes = {}
    roads = [Road.GATHER, Road.TWO_PHASE]
    native = native_sum(device)
    yield "backend sums FP8 natively, by probe", "yes" if native else "no", True
    for road in [*roads, *([Road.NATIVE] if native else [])]:
        with Wire() as wire:
            (q,) = mean([g], mu, road=road).tensors
        codes[road] = q.codes.view(torch.uint8)
        same([codes[road]], road)
        error = relative(q.dequantize().cpu(), wanted)
        ms = timed(lambda road=road: mean([g], mu, road=road), device, repeats)
        yield f"mean of {n / 1e6:g} M, FP8 {road}", f"{wire.nbytes / n:.2f} B, {ms:.2f} ms", error < 0.05
        yield "  off the float32 mean", f"{error:.4f}", True
    yield "roads agree to the bit", "yes", torch.equal(codes[roads[0]], codes[roads[1]])
    step = q.scale.cpu() * WORLD
    parts = [E4M3.grid.value(E4M3.grid.round(x / step)) for x in given]
    alone = E4M3.grid.round(sum(parts)).view(torch.uint8)
    yield "codes are those of one process on a CPU", "yes", torch.equal(codes[roads[0]].cpu(), alone)
    for dtype in (torch.float32, torch.bfloat16):
        x = g.to(dtype)
        with Wire() as wire:
            dist.all_reduce(x)
        ms = timed(lambda x=x: dist.all_reduce(x), device, repeats)
        name = str(dtype).removeprefix("torch.")
        yield f"sum of {n / 1e6:g} M, {name}", f"{wire.nbytes / n:.2f} B, {ms:.2f} ms", True
    if rank == 1:
        g[3] = torch.nan
    found = mean([g], mu)
    lost = found.tensors[0].scale.isnan().item()
    yield "NaN on rank 1 is NaN on all", "yes", lost and not found.finite.item()


def net(width, device, kind=nn.Linear):
    torch.manual_seed(0)
    return nn.Sequential(
        kind(width, 4 * width), nn.GELU(), nn.LayerNorm(4 * width), kind(4 * width, width)
    ).to(device)


def batch(step, rank, width, device):
    x = torch.randn(64, width, generator=torch.Generator().manual_seed(100 * step + rank)).to(device)
    return x, x.sin()


def step_of(model, rank, width, device, step):
    x, y = batch(step, rank, width, device)
    loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    return loss


def bfloat16(state, bucket):
    """A hook that averages in bfloat16; torch's own refuses gloo."""
    narrow = bucket.buffer().to(torch.bfloat16) / WORLD
    done = dist.all_reduce(narrow, async_op=True).get_future()
    return done.then(lambda f: bucket.buffer().copy_(f.value()[0]))


def ddp(rank, device, width, repeats):
    """DDP with no hook, in bfloat16, and with ours."""
    last = {}
    for how in ("float32", "bfloat16", "FP8"):
        model = net(width, device)
        wrapped = DistributedDataParallel(model, device_ids=None if device.index is None else [device.index])
        state = attach(wrapped) if how == "FP8" else None
        if how == "bfloat16":
            wrapped.register_comm_hook(None, bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(10):
            optimizer.zero_grad()
            loss = step_of(wrapped, rank, width, device, step)
            if state is None or state.finite():
                optimizer.step()
        same(list(model.parameters()), f"DDP {how}")
        dist.all_reduce(loss.detach())
        last[how] = loss.item()
        ms = timed(lambda w=wrapped: step_of(w, rank, width, device, 0), device, repeats)
        yield f"DDP {how}: loss after 10 steps; a pass", f"{last[how]:.5f}; {ms:.2f} ms", True
    yield "  FP8 within 1 % of float32", "yes", abs(last["FP8"] / last["float32"] - 1) < 0.01


class Faked(nn.Linear):
    """What a layer computes whose weight was gathered in 8 bits."""

    def forward(self, x):
        return nn.functional.linear(x, fake(self.weight, E4M3, surrogate=Identity()), self.bias)


def fsdp(rank, device, width, repeats):
    """FSDP2: float32, FP8 gather, FP8 gather and reduce-scatter; and one process."""
    alone = net(width, device, Faked)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-3)
    for step in range(5):
        optimizer.zero_grad()
        for r in range(WORLD):
            x, y = batch(step, r, width, device)
            (nn.functional.mse_loss(alone(x), y) / WORLD).backward()
        optimizer.step()
    for how in ("float32", "FP8 gather", "FP8 gather and scatter"):
        model = net(width, device)
        if how != "float32":
            fp8_gather(model)
        for module in (model[0], model[3], model):
            fully_shard(module)
            if "scatter" in how:
                module.set_custom_reduce_scatter(BlockReduceScatter())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if how != "float32":
            optimizer.register_step_post_hook(lambda *_, model=model: sync_steps(model))
        for step in range(5):
            optimizer.zero_grad()
            step_of(model, rank, width, device, step)
            optimizer.step()
        weight = model[0].weight.detach().full_tensor()
        moved = relative(weight, alone[0].weight.detach())
        ms = timed(lambda m=model: step_of(m, rank, width, device, 0), device, repeats)
        holds = how != "FP8 gather" or moved < 5e-4  # without rounding alike: 3e-3
        yield f"FSDP2 {how}: weight off one process; a pass", f"{moved:.1e}; {ms:.2f} ms", holds


def zero(rank, device, width, repeats):
    """Whole-tensor ZeRO with the states of FP8-LM."""
    model = net(width, device)
    found = Zero(model, lambda params: low_adamw("fp8-lm", params, lr=1e-3))
    losses = []
    for step in range(10):
        found.zero_grad()
        losses.append(step_of(model, rank, width, device, step % 2).item())
        found.step()
    same(list(model.parameters()), "ZeRO")
    yield "ZeRO, FP8-LM: loss of steps 1 and 10", f"{losses[0]:.4f}, {losses[-1]:.4f}", losses[-1] < losses[0]


class Rounded(torch.autograd.Function):
    """Numbers rounded forward, their gradient rounded backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        return x if forward is None else forward.quantize(x).dequantize()

    @staticmethod
    def backward(ctx, g):
        return g if ctx.backward is None else ctx.backward.quantize(g).dequantize(), None, None


class Pair(nn.Module):
    """Norm, up, down; ``alone``: with the roundings of the gathers, in one process."""

    def __init__(self, width, alone):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.alone = nn.LayerNorm(width), alone
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        h = self.norm(x)
        y = self.down(nn.functional.gelu(self.up(Rounded.apply(h, E4M3, None) if self.alone else h)))
        return x + (Rounded.apply(y, None, E5M2) if self.alone else y)


def parallel(rank, device, width, repeats):
    """A tensor and sequence parallel pair."""
    alone, split = (Pair(width, a).to(device) for a in (True, False))
    styles = {"norm": SequenceParallel(use_local_output=True), "up": Columns(), "down": Rows()}
    parallelize_module(split, init_device_mesh(device.type, (WORLD,)), styles)
    made = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 128, width, generator=made).to(device) for _ in range(2))
    alone(x).backward(g)
    part, own = (t.chunk(WORLD, 1)[rank].contiguous() for t in (x, g))
    with Wire() as wire:
        split(part).backward(own)
    off = max(
        relative(p.grad.full_tensor(), q.grad)
        for p, q in zip(split.parameters(), alone.parameters(), strict=True)
    )
    per = sum(c.nbytes for c in wire.calls if c.kind == "all-gather") / part.numel()
    ms = timed(lambda: split(part).backward(own), device, repeats)
    label = "tensor and sequence parallel: gradients off one process; gathered; a pass"
    # float32 products in another order; on a GPU another kernel besides
    yield label, f"{off:.1e}; {per:.2f} B; {ms:.2f} ms", off < 1e-2


def work(rank, store, cpu, out):
    """All rows on one rank."""
    try:
        torch.set_num_threads(1)
        device = torch.device("cpu") if cpu else torch.device("cuda", rank)
        if not cpu:
            torch.cuda.set_device(rank)
            torch.backends.cuda.matmul.allow_tf32 = False
        limit = datetime.timedelta(seconds=60)
        where = {"init_method": f"file://{store}", "rank": rank, "world_size": WORLD, "timeout": limit}
        dist.init_process_group("gloo" if cpu else "nccl", **where)
        n, width, repeats = (2**16, 64, 3) if cpu else (2**26, 2048, 20)
        for rows, size in ((sums, n), (ddp, width), (fsdp, width), (zero, width), (parallel, width)):
            for what, value, holds in rows(rank, device, size, repeats):
                if rank == 0:
                    out.put(("row", what, value))
                assert holds, f"{what}: {value} does not hold (rank {rank})"
        dist.barrier()
        out.put(("done", rank, ""))
        dist.destroy_process_group()
    except BaseException:
        out.put(("failed", rank, traceback.format_exc()))
        out.close()
        out.join_thread()
        os._exit(1)


def main():
    """Start the ranks, print rows as they come, end all at the first failure."""
    cpu = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cpu.add_argument("--cpu", action="store_true", help="gloo on the CPU, small")
    cpu = cpu.parse_args().cpu
    if not cpu and torch.cuda.device_count() < WORLD:
        print(
            f"needs {WORLD} CUDA devices, found {torch.cuda.device_count()}; --cpu rehearses", file=sys.stderr
        )
        raise SystemExit(2)
    context = mp.get_context("spawn")
    out, store = context.Queue(), tempfile.mktemp()
    ranks = [context.Process(target=work, args=(r, store, cpu, out), daemon=True) for r in range(WORLD)]
    for process in ranks:
        process.start()
    where = "gloo, CPU" if cpu else f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}, "
    where += "" if cpu else f"{WORLD} x {torch.cuda.get_device_name(0)}"
    print(f"torch {torch.__version__}, {where}\n\n| what | found |\n|---|--:|", flush=True)
    done, failed = 0, ""
    while done < WORLD and not failed:
        try:
            kind, what, value = out.get(timeout=120)
        except queue.Empty:
            failed = "no row came for two minutes"
            break
        if kind == "row":
            print(f"| {what} | {value} |", flush=True)
        elif kind == "done":
            done += 1
        else:
            failed = f"rank {what}:\n{value}"
    for process in ranks:
        process.join(10) if not failed else process.kill()
    if failed:
        print(failed, file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
