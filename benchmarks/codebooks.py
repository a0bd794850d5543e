"""Error of single layers at 2 to 4 bits: learned tables against grids that are the same for every tensor.

    OMP_NUM_THREADS=1 python benchmarks/codebooks.py --data FOLDER [--only SUBSTRING] [--block 8]

Layers of one block of SmolLM2, solved under the Gram matrix of the float model's inputs on windows of 512
tokens of WikiText-2 validation. Error: tr(E H E^T) / tr(W H W^T), E = W - Q, in decibels, mean over the
layers: `seen` under that H, `unseen` under the H of 16 windows of the test text. Seconds are those of the
CPU, one thread. FOLDER holds wikitext2_raw_valid.txt and wikitext2_raw_test.txt.
"""

import argparse
import contextlib
import math
import time
from pathlib import Path

import torch

import fewbit
from fewbit.io.source import open_source
from fewbit.recipe import named
from fewbit.solve import Stats

LAYERS = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
G64 = {"group_size": "64", "symmetric": "false"}
ROWS = (
    ("GPTQ, groups of 64, asymmetric", "gptq", {"bits": "2", **G64}),
    ("HIGGS p = 2 + GPTQ", "higgs", {"bits": "2", "solver": "gptq"}),
    ("QuIP#", "quip-sharp", {"bits": "2", "passes": "1"}),
    ("GPTVQ d = 2", "gptvq", {}),
    ("AQLM 2x8", "aqlm", {}),
    ("GPTVQ d = 1", "gptvq", {"d": "1"}),
    ("GPTVQ d = 4", "gptvq", {"d": "4"}),
    ("GPTVQ d = 2, no update", "gptvq", {"updates": "0"}),
    ("GPTVQ d = 2, 3 passes", "gptvq", {"passes": "3"}),
    ("GPTVQ d = 2, a step per row", "gptvq", {"scale": "true"}),
    ("GPTVQ d = 4, a step per row", "gptvq", {"d": "4", "scale": "true"}),
    ("GPTVQ d = 2, Hadamard basis", "gptvq", {"basis": "hadamard"}),
    ("AQLM 2x8, Hadamard basis", "aqlm", {"basis": "hadamard"}),
    ("AQLM 2x8, tables fitted once", "aqlm", {"epochs": "0"}),
    ("AQLM 2x8, 2 epochs", "aqlm", {"epochs": "2"}),
    ("GPTVQ d = 4, Hadamard basis", "gptvq", {"d": "4", "basis": "hadamard"}),
    ("GPTVQ d = 2, 2.25 bits", "gptvq", {"overhead": "0.25"}),
    ("GPTVQ d = 4, 2.25 bits", "gptvq", {"d": "4", "overhead": "0.25"}),
    ("GPTQ, 3 bits, groups of 64", "gptq", {"bits": "3", **G64}),
    ("k-means, 3 bits, rows", "kmeans", {"bits": "3"}),
    ("k-means, 3 bits, rows, GPTQ", "kmeans", {"bits": "3", "solver": "gptq"}),
    ("GPTVQ d = 2, 3.125 bits", "gptvq", {"bits": "3"}),
    ("k-means, 4 bits, rows", "kmeans", {"bits": "4"}),
)


class StoppedError(RuntimeError):
    """Behind the block nothing is of interest."""


def grams(model, block: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """X^T X / tokens of each layer's input; the forward stops behind the block."""
    sums, layer = {}, model.model.layers[block]

    def hook(name):
        def add(module, args):
            x = args[0].flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.t() @ x / ids.numel()

        return add

    def stop(*_):
        raise StoppedError

    handles = [layer.get_submodule(n).register_forward_pre_hook(hook(n)) for n in LAYERS]
    handles.append(layer.register_forward_hook(stop))
    for row in ids:
        with contextlib.suppress(StoppedError):
            model(input_ids=row[None])
    for handle in handles:
        handle.remove()
    return sums


def error(w, q, h) -> float:
    """tr(E H E^T) / tr(W H W^T) in decibels."""
    e = w - q
    return 10 * math.log10(float(((e @ h) * e).sum() / ((w @ h) * w).sum()))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    tokenizer = open_source("smollm2").tokenizer()
    model = fewbit.load("smollm2", dtype=torch.float32)

    def windows(name: str, count: int) -> torch.Tensor:
        text = (args.data / f"wikitext2_raw_{name}.txt").read_text()[: 4000 * count]
        return torch.tensor(tokenizer(text)["input_ids"][: 512 * count]).view(count, 512)

    seen = grams(model, args.block, windows("valid", args.samples))
    unseen = grams(model, args.block, windows("test", 16))
    print(f"# Errors of the layers of block {args.block}\n\n{args.samples} windows of calibration; dB.\n")
    names = [n.rpartition(".")[2].removesuffix("_proj") for n in LAYERS]
    print(f"| | bits | seen | unseen | {' | '.join(names)} (unseen) | s |")
    print("|---|--:|--:|--:|" + "--:|" * (len(names) + 1))
    for title, recipe, settings in ROWS:
        if args.only not in title:
            continue
        rule, found, bits, count, began = named(recipe, settings).rules[0], [], 0.0, 0, time.process_time()
        for name in LAYERS:
            w = model.model.layers[args.block].get_submodule(name).weight.float()
            stats, part = Stats(gram=seen[name]), w
            if rule.basis is not None:
                part = rule.basis.enter(w)
                stats = stats.mapped(rule.basis.input_map(w.shape[1]).apply)
            q = rule.solver(part, stats, rule.weight)
            value = q.dequantize()
            if rule.basis is not None:
                value = rule.basis.leave(value, inputs=True)
            found.append((error(w, value, seen[name]), error(w, value, unseen[name])))
            bits, count = bits + 8 * q.nbytes, count + w.numel()
        took = time.process_time() - began
        own = [sum(part) / len(found) for part in zip(*found, strict=True)]
        each = " | ".join(f"{u:.2f}" for _, u in found)
        print(
            f"| {title} | {bits / count:.3f} | {own[0]:.2f} | {own[1]:.2f} | {each} | {took:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
