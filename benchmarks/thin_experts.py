"""How few tokens of its own make GPTQ of an expert worse than all tokens of the block do.

    python benchmarks/thin_experts.py [--data FOLDER]

SmolLM2-135M has no experts, but inputs that a router could part: those of an MLP (576 wide) are sent to 16
experts, by the two largest of 16 products with random directions ("random"), or to the nearest of 16 centres
of k-means ("clusters": experts as unlike as they can be). Each expert's weight is the layer's gate_proj, in 3
bits with groups of 64. It is solved from n of its own tokens, from all tokens, and rounded without any; the
error is that of the output on tokens of this expert in another text. Means over experts and layers 5, 15, 25.
"""

import argparse
from pathlib import Path

import torch

import fewbit
from fewbit.format import Stats
from fewbit.recipe import gptq
from fewbit.solve import Rtn
from fewbit.stream.choose import error
from fewbit.stream.data import Calibration, sample_tokens

ROOT = Path(__file__).resolve().parent
LAYERS, EXPERTS = (5, 15, 25), 16
COUNTS = (36, 144, 288, 576, 1152, 1728, 2304)


def gram(x):
    return x.T @ x / len(x)


def centres(x, generator):
    """Of k-means after 20 rounds, [E, h]."""
    c = x[torch.randperm(len(x), generator=generator)[:EXPERTS]]
    for _ in range(20):
        near = torch.cdist(x, c).argmin(1)
        c = torch.stack([x[near == e].mean(0) if (near == e).any() else c[e] for e in range(EXPERTS)])
    return c


def routed(x, way, table):
    """[tokens, E] bool: who gets what."""
    if way == "clusters":
        return torch.nn.functional.one_hot(torch.cdist(x, table).argmin(1), EXPERTS).bool()
    top = (x @ table.T).topk(2, -1).indices
    return torch.zeros(len(x), EXPERTS, dtype=torch.bool).scatter(1, top, True)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    data = parser.parse_args().data
    model, source = fewbit.load("smollm2"), fewbit.io.source.open_source("smollm2")
    seen = {}
    for name, file, samples in (("solve", "valid", 48), ("test", "test", 16)):
        text = Calibration(source=data / f"wikitext2_raw_{file}.txt", samples=samples, seqlen=512)
        caught = {i: [] for i in LAYERS}
        handles = [
            model.model.layers[i].mlp.register_forward_pre_hook(
                lambda m, args, own=own: own.append(args[0].flatten(0, 1))
            )
            for i, own in caught.items()
        ]
        for ids in sample_tokens(text, source.tokenizer()).split(4):
            model.model(ids)
        for handle in handles:
            handle.remove()
        seen[name] = {i: torch.cat(own) for i, own in caught.items()}
    rule = gptq(bits=3, group_size=64).rules[0]
    print("| router (experts) | own tokens | per input | error from its own | mixed | from all | rounded |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for way in ("random", "clusters"):
        found = {n: [] for n in COUNTS}
        for i in LAYERS:
            generator = torch.Generator().manual_seed(i)
            x, held, w = seen["solve"][i], seen["test"][i], model.model.layers[i].mlp.gate_proj.weight.float()
            table = torch.randn(EXPERTS, x.shape[1], generator=generator)
            table = centres(x, generator) if way == "clusters" else table
            mine, theirs = routed(x, way, table), routed(held, way, table)
            gram_of_all = gram(x)
            of_all = rule.solver(w, Stats(gram=gram_of_all, tokens=len(x)), rule.weight).dequantize()
            plain = Rtn()(w, Stats(), rule.weight).dequantize()
            for e in range(0, EXPERTS, 4):
                own, judge = x[mine[:, e]], held[theirs[:, e]]
                own = own[torch.randperm(len(own), generator=generator)]
                if len(judge) < 100 or len(own) < COUNTS[-1]:
                    continue
                judge = gram(judge)
                rest = error(w, of_all, judge), error(w, plain, judge)
                for n in COUNTS:
                    h = gram(own[:n])
                    mixed = (n * h + x.shape[1] * gram_of_all) / (n + x.shape[1])
                    for_it = (rule.solver(w, Stats(gram=g, tokens=n), rule.weight) for g in (h, mixed))
                    found[n].append((*(error(w, q.dequantize(), judge) for q in for_it), *rest))
        for n, rows in found.items():
            own, mixed, of_all, plain = (sum(v) / len(rows) for v in zip(*rows, strict=True))
            share, rest = n / x.shape[1], f"{of_all:.4f} | {plain:.4f} |"
            print(f"| {way} ({len(rows)}) | {n} | {share:.3g} | {own:.4f} | {mixed:.4f} | {rest}")


if __name__ == "__main__":
    main()
