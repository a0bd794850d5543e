"""Error of single blocks after rounding, GPTQ, learned clipping (OmniQuant) and signed rounding (AutoRound).

    OMP_NUM_THREADS=1 python benchmarks/tune_blocks.py [--data FOLDER] > benchmarks/results/tune_blocks.md

Blocks of the packaged SmolLM2 by themselves: inputs and targets come from the float model on WikiText-2
validation text, 12 sequences of 512 tokens to calibrate and 4 further ones held out. Each figure is
sum (F(Q, X) - Y)^2 / sum Y^2 of the block's output, where the first token of a sequence is left out: its
massive activations would be nearly all of the sum. The seconds of the first row contain the products X^T X,
which the range search and GPTQ use too.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fewbit
from fewbit.format import BF16, MSE, Format, Group, MinMax, Stats, Zero
from fewbit.grid import by_name
from fewbit.io.source import open_source
from fewbit.nn.blocks import find_blocks, linears
from fewbit.solve import Ldlq
from fewbit.solve.calls import Call, Calls, Target
from fewbit.solve.lwc import Lwc
from fewbit.solve.signround import SignRound

ROOT = Path(__file__).parent
SEQLEN, TRAIN, HELD = 512, 12, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--blocks", default="0,10,20")
    parser.add_argument("--bits", default="4,3,2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = (args.data / "wikitext2_raw_valid.txt").read_text()[: 8 * SEQLEN * (TRAIN + HELD)]
    ids = open_source("smollm2").tokenizer()(text)["input_ids"][: SEQLEN * (TRAIN + HELD)]
    ids = torch.tensor(ids).view(TRAIN + HELD, SEQLEN)
    model = fewbit.load("smollm2")
    print(
        "Printed by `OMP_NUM_THREADS=1 python benchmarks/tune_blocks.py` (its first lines say how). Group 64,"
    )
    print("asymmetric, bf16 steps; one thread of a shared machine, CPU seconds.\n")
    print("| bits | block | method | calibration | held out | CPU s |")
    print("|--:|--:|---|--:|--:|--:|")
    for index in map(int, args.blocks.split(",")):
        block = find_blocks(model).modules[index]
        calls, outputs = catch(model, block, ids)
        for bits in map(int, args.bits.split(",")):
            for name, weights, seconds in solved(block, calls[:TRAIN], outputs[:TRAIN], bits):
                train = error(block, calls[:TRAIN], outputs[:TRAIN], weights)
                held = error(block, calls[TRAIN:], outputs[TRAIN:], weights)
                print(f"| {bits} | {index} | {name} | {train:.5f} | {held:.5f} | {seconds:.1f} |", flush=True)


@torch.no_grad()
def catch(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[list[Call], list[Tensor]]:
    """Calls of one block in the float model, and what it gave."""
    calls, outputs = [], []

    def hook(module, args, kwargs, out):
        calls.append((args, kwargs))
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handle = block.register_forward_hook(hook, with_kwargs=True)
    for row in ids:
        model(row[None], use_cache=False)
    handle.remove()
    return calls, outputs


def solved(block: nn.Module, calls: list[Call], outputs: list[Tensor], bits: int):
    """(name, weights by layer, CPU seconds) of each method."""
    layers = linears(block)
    rules = {"min-max": MinMax(), "weighted MSE range": MSE()}
    formats = {
        name: Format(grid=by_name(f"uint{bits}"), block=Group(64), range=rule, zero=Zero.INTEGER, scale=BF16)
        for name, rule in rules.items()
    }
    start = time.process_time()
    stats = grams(block, calls, layers)
    for name, fmt in formats.items():
        yield f"rtn, {name}", *timed(lambda n, w, fmt=fmt: fmt.quantize(w, stats[n].gram), layers, start)
        start = time.process_time()
    best = formats["weighted MSE range"]
    yield "gptq, weighted MSE range", *timed(lambda n, w: Ldlq()(w, stats[n], best), layers, start)
    targets = {n: Target(format=best) for n in layers}
    for tuner in (Lwc(steps=100, lr=0.05), SignRound()):
        start = time.process_time()
        got = tuner.tune(block, targets, calls, outputs, 0)
        seconds = time.process_time() - start
        name = f"{type(tuner).__name__.lower()}, {tuner.steps} steps from the MSE range"
        yield name, {n: t.q.dequantize() for n, t in got.items()}, seconds


def timed(solve, layers: dict[str, nn.Module], start: float) -> tuple[dict[str, Tensor], float]:
    """Weights by ``solve(name, weight)`` and CPU seconds since ``start``."""
    weights = {n: solve(n, m.weight.detach()).dequantize() for n, m in layers.items()}
    return weights, time.process_time() - start


@torch.no_grad()
def grams(block: nn.Module, calls: list[Call], layers: dict[str, nn.Module]) -> dict[str, Stats]:
    """H = X^T X / tokens of every layer's input."""
    sums: dict[str, Tensor] = {}

    def hook(name):
        def add(module, args):
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.t() @ x

        return add

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in layers.items()]
    for args, kwargs in calls:
        block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    tokens = len(calls) * SEQLEN
    return {n: Stats(gram=h / tokens, tokens=tokens) for n, h in sums.items()}


@torch.no_grad()
def error(block: nn.Module, calls: list[Call], outputs: list[Tensor], weights: dict[str, Tensor]) -> float:
    """Relative squared error of the block without first tokens."""
    run = Calls(block, {n: Target(format=Format(grid=by_name("fp32"))) for n in weights}, calls, outputs)
    wrong = sum(float((run.call(weights, i) - y)[:, 1:].square().sum()) for i, y in enumerate(outputs))
    return wrong / sum(float(y[:, 1:].square().sum()) for y in outputs)


if __name__ == "__main__":
    main()
