"""A Llama block in FP8 on one GPU: time, memory and error of each way, torchao's beside ours, in one run.

    python benchmarks/fp8_block.py               on an H100; torchao where it is installed
    python benchmarks/fp8_block.py --profile "folded"

Hidden 4096, feed-forward 14336, 32 heads and 8 of keys and values, 2 x 4096 tokens, bfloat16, torch.compile;
forward and backward. Ways run one after the other, each compiled anew; the first is measured again at the
end, which shows how far the clock has moved meanwhile.

    ms          median of one step between two events, the host waiting before each
    back to back    the same of ten steps without a wait, per step: what a training run sees
    peak GB     above what model, input and gradient take
    error       of output, input gradient, gradients of the first and the last weight, against bfloat16

Writes benchmarks/results/fp8_block.{md,json}. Without a GPU it says so and leaves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fewbit.train import lower
from fewbit.train.folded import Folded
from fewbit.train.scalings import rowwise, tensorwise

RESULTS = Path(__file__).parent / "results"
D, HEADS, KV, SIZE, FF, BATCH, TOKENS = 4096, 32, 8, 128, 14336, 2, 4096
E5M2 = torch.float8_e5m2


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"q": (D, D), "k": (D, KV * SIZE), "v": (D, KV * SIZE), "o": (D, D)}
        sizes |= {"gate": (D, FF), "up": (D, FF), "down": (FF, D)}
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        self.first, self.second = Norm(D), Norm(D)
        angle = torch.arange(TOKENS)[:, None] / 500000.0 ** (torch.arange(0, SIZE, 2) / SIZE)
        angle = torch.cat((angle, angle), -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def turn(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def forward(self, x):
        def heads(y):
            return y.view(*y.shape[:2], -1, SIZE).transpose(1, 2)

        n = self.first(x)
        q, k, v = self.turn(heads(self.q(n))), self.turn(heads(self.k(n))), heads(self.v(n))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        n = self.second(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


def torchao(recipe: str):
    def convert(model):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))

    return convert


def ours(products):
    return lambda model: lower(model, products)


WAYS = {
    "bfloat16": lambda model: None,
    "folded-tensorwise": ours(Folded(by_rows=False, gradient=E5M2)),
    "folded-tensorwise, fast sums": ours(Folded(by_rows=False, gradient=E5M2, fast=(True, True))),
    "folded": ours(Folded()),
    "folded, fast sums": ours(Folded(fast=(True, True))),
    "torchao tensorwise": torchao("tensorwise"),
    "torchao rowwise": torchao("rowwise"),
    "torchao rowwise, wide dW": torchao("rowwise_with_gw_hp"),
    "tensorwise": ours(tensorwise()),
    "rowwise": ours(rowwise()),
}


class Run:
    """One way, compiled and warm."""

    def __init__(self, name: str, convert, graphs: bool):
        torch.manual_seed(0)
        self.name, self.events = name, []
        self.model = Block().to("cuda", torch.bfloat16)
        convert(self.model)
        mode = "reduce-overhead" if graphs else None
        self.call = torch.compile(self.model, dynamic=False, mode=mode)
        g = torch.Generator("cuda").manual_seed(1)
        shape = BATCH, TOKENS, D
        self.x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=g).requires_grad_()
        self.grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=g)
        start = time.time()
        for _ in range(3):
            y = self.step()
        torch.cuda.synchronize()
        self.compiling = time.time() - start
        found = (y, self.x.grad, self.model.q.weight.grad, self.model.down.weight.grad)
        self.found = [t.detach().float().cpu() for t in found]
        del y, found
        self.clear()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        self.peak = None if graphs else peak  # graphs have a pool of their own, which is there before
        self.forward, self.both, self.stream = [], [], []
        self.clear()

    def clear(self):
        self.x.grad = None
        for p in self.model.parameters():
            p.grad = None

    def step(self, event=None):
        self.clear()
        y = self.call(self.x)
        if event is not None:
            event.record()
        y.backward(self.grad)
        return y

    def turn(self, steps: int):
        for _ in range(steps):
            a, b, c = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            torch.cuda.synchronize()
            a.record()
            self.step(b)
            c.record()
            c.synchronize()
            self.forward.append(a.elapsed_time(b))
            self.both.append(a.elapsed_time(c))
        a.record()
        for _ in range(steps):
            self.step()
        c.record()
        c.synchronize()
        self.stream.append(a.elapsed_time(c) / steps)
        self.clear()

    def row(self, reference) -> dict:
        error = [((a - b).norm() / b.norm()).item() for a, b in zip(self.found, reference, strict=True)]
        return {
            "way": self.name, "forward": statistics.median(self.forward), "ms": statistics.median(self.both),
            "stream": statistics.median(self.stream), "peak_gb": self.peak, "error": error,
            "compiling_s": self.compiling,
        }  # fmt: skip


def profile(run: Run) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run.step()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=60))


def table(rows: list[dict]) -> str:
    base = next(r for r in rows if r["way"] == "bfloat16")
    lines = [
        "| way | forward ms | both ms | back to back ms | tokens/s | of bfloat16 | peak GB | error "
        "y, dx, dWq, dWdown |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        error = ", ".join(f"{e:.4f}" for e in r["error"])
        lines.append(
            f"| {r['way']} | {r['forward']:.2f} | {r['ms']:.2f} | {r['stream']:.2f} | "
            f"{BATCH * TOKENS / r['stream']:.0f} k | {base['stream'] / r['stream']:.2f} | "
            f"{'' if r['peak_gb'] is None else format(r['peak_gb'], '.2f')} | {error} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="names of ways, by comma")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs: no waiting for the host")
    parser.add_argument("--profile", default="", help="a way whose kernels are listed instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and there is none; on a CPU FP8 is simulated")
    names = [args.profile] if args.profile else (args.only.split("|") if args.only else list(WAYS))
    rows, missing, reference = [], [], None
    for name in names if args.profile else [*names, names[0]]:
        torch._dynamo.reset()
        try:
            run = Run(name, WAYS[name], args.graphs)
        except Exception as e:  # one way that this torch cannot do leaves the others their rows
            missing.append(f"{name}: {type(e).__name__}: {str(e).splitlines()[0]}")
            print(missing[-1], flush=True)
            continue
        if args.profile:
            return profile(run)
        for _ in range(args.turns):
            run.turn(10)
        reference = reference or run.found
        rows.append(run.row(reference))
        print(f"{name}: {rows[-1]}", flush=True)
        del run
    device = torch.cuda.get_device_name()
    graphs = " --graphs" if args.graphs else ""
    text = f"`python benchmarks/fp8_block.py{graphs}` on {device}, torch {torch.__version__}\n\n"
    text += table(rows) + "".join(f"\n\nnot measured: {m}" for m in missing) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    stem = "fp8_block_graphs" if args.graphs else "fp8_block"
    (RESULTS / f"{stem}.md").write_text(text)
    (RESULTS / f"{stem}.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
