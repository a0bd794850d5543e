"""Bits chosen by HIGGS's linear model against plain allocations of the same size.

    python benchmarks/search_bits.py [--data FOLDER] [--device cuda] [--layers N] [--windows W]
                                     [--only FAMILY ...] [--minutes M] [--results FILE]

SmolLM2-135M at 2.25, 2.5 and 3.25 bits of codes per weight on average (steps of rows take 0.023 more with
every HIGGS row). Each layer takes a size from its family: HIGGS p = 2 at 1.5 to 4 bits, rounded or with
feedback, or QTIP (mad, L = 12) at 2, 3 and 4. The search reads WikiText-2 validation; what is reported was
measured on the test text: KL against the float model, 12 windows of 512.

No grid has 2.25 or 3.25 bits, so "uniform" is several things, all of at least the size of the search's:

- the grid of that many bits, where it exists (2.5 with HIGGS);
- the two sizes around the budget, so mixed that the size is met: by type (attention, gate, up, down weigh a
  quarter each: every way to choose), by depth (first or last blocks get more) and three random sets of
  blocks;
- the line between the two sizes in log KL: what a grid of the missing size could be expected to reach.

Layers are solved once each, from the float model's inputs, so that all allocations of a family share their
codes. At the end the search's recipe and that of the best plain allocation go through fewbit.quantize, which
feeds the inputs of quantized layers, and are measured as they were saved ("quantized").

Results go to benchmarks/results/search_bits.json as they come and are not measured again. For a trial:
--layers, so many of them, spread over the model, the rest float; --windows, of every text.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from linearity import Models, higgs

import fewbit
from fewbit.recipe import Recipe, Rule, named
from fewbit.search import Choice, allocate, fisher, noise_responses
from fewbit.stream.data import Calibration

ROOT = Path(__file__).parent
BUDGETS = (2.25, 2.5, 3.25)
SIZES = (1.5, 2, 2.5, 3, 3.5, 4)
TYPES = ("self_attn", "gate_proj", "up_proj", "down_proj")


def qtip(bits: float) -> Choice:
    """QTIP at a whole number of bits."""
    rule = named("qtip", {"bits": f"{bits:g}"}).rules[0]
    return Choice(format=rule.weight, solver=rule.solver, basis=rule.basis)


FAMILIES = {
    "HIGGS": {s: higgs(f"{s:g}") for s in SIZES},
    "HIGGS, feedback": {s: higgs(f"{s:g}", solver="gptq") for s in SIZES},
    "QTIP": {s: qtip(s) for s in (2, 3, 4)},
}


def block_of(name: str) -> int:
    """Of model.layers.7.mlp.up_proj: 7."""
    return int(name.split(".")[2])


def plain(names: list[str], sizes: list[float], budget: float):
    """(name, layer -> size): allocations without a search, none smaller than the budget."""
    if budget in sizes:
        yield "uniform", dict.fromkeys(names, budget)
        sizes = [s for s in sizes if s != budget]
    low, high = max(s for s in sizes if s < budget), min(s for s in sizes if s > budget)
    share = (budget - low) / (high - low)
    give = lambda more: {n: high if more(n) else low for n in names}  # noqa: E731
    quarters = math.ceil(4 * share - 1e-9)
    for kinds in itertools.combinations(TYPES, quarters):
        said = " + ".join(k.removesuffix("_proj").replace("self_attn", "attention") for k in kinds)
        yield f"{low:g} and {high:g}, more in {said}", give(lambda n, k=kinds: any(t in n for t in k))
    blocks = sorted({block_of(n) for n in names})
    count = math.ceil(share * len(blocks) - 1e-9)
    sets = {"first blocks": blocks[:count], "last blocks": blocks[-count:]}
    sets |= {f"random blocks {i}": random.Random(i).sample(blocks, count) for i in range(3)}
    for said, own in sets.items():
        yield f"{low:g} and {high:g}, more in {said}", give(lambda n, o=own: block_of(n) in o)


def fused(names: list[str]) -> list[list[int]]:
    """Indices of layers that runtimes fuse: q, k, v; gate, up."""
    alike: dict[tuple, list[int]] = {}
    for i, n in enumerate(names):
        kind = n.rpartition(".")[2]
        group = "qkv" if kind in ("q_proj", "k_proj", "v_proj") else "gu" if kind != "down_proj" else kind
        alike.setdefault((block_of(n), kind if kind == "o_proj" else group), []).append(i)
    return [g for g in alike.values() if len(g) > 1]


def searched(models: Models, family: dict[float, Choice], tag: str, budget: float, found: dict):
    """(name, layer -> size, expected KL) by the linear model, several ways."""
    names, sizes = list(models.clean), list(family)
    shapes = [tuple(models.clean[n].shape) for n in names]
    numbers = np.array([math.prod(s) for s in shapes], dtype=float)
    costs = numbers[:, None] * np.array(sizes)  # of codes: what every row has beside them is the same
    for said, a, kind, together in (
        ("search", "fisher", "effective", ()),
        ("search, fused layers alike", "fisher", "effective", fused(names)),
        ("search, a by noise", "noise", "effective", ()),
        ("search, t^2 of the weight", "fisher", "weight", ()),
    ):
        errors = [[getattr(models.errors[f"{tag} {s}"][n], kind) for s in sizes] for n in names]
        losses = np.array(errors) * np.array([found[a][n] for n in names])[:, None]
        chosen = allocate(costs, losses, budget * numbers.sum(), together)
        expected = float(losses[np.arange(len(names)), chosen].sum())
        yield said, {n: sizes[c] for n, c in zip(names, chosen, strict=True)}, expected


def recipe(family: dict[float, Choice], allocation: dict[str, float]) -> Recipe:
    """A rule per layer."""
    own = {n: family[s] for n, s in allocation.items()}
    rules = (Rule(match=n, weight=c.format, solver=c.solver, basis=c.basis) for n, c in own.items())
    return Recipe(name="search", rules=tuple(rules))


def quantized(models: Models, made: Recipe, device: str) -> dict[str, float]:
    """What users get: quantized layer after layer, saved, loaded, measured."""
    folder = Path(tempfile.mkdtemp())
    fewbit.load("smollm2", dtype=torch.float32).save_pretrained(folder / "plain")
    models.source.tokenizer().save_pretrained(folder / "plain")
    text = Calibration(source=models.data / "wikitext2_raw_valid.txt", samples=models.count or 32, seqlen=512)
    result = fewbit.quantize(folder / "plain", made, output=folder / "out", calibration=text, device=device)
    loaded = fewbit.load(folder / "out", device=device, dtype=torch.float32)
    got = fewbit.evaluate(loaded, models.test, models.protocol, against=models.judge)
    shutil.rmtree(folder)
    return {"kl": got.kl, "kl_error": got.kl_error, "nll": got.nll, "bits": result.plan.bits_per_weight}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent.parent / "shared" / "data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="so many layers of the model only")
    parser.add_argument("--windows", type=int, help="of every text")
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), help="families")
    parser.add_argument("--minutes", type=float, default=1e9, help="start nothing further after this time")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "search_bits.json")
    args = parser.parse_args()
    stop = time.time() + 60 * args.minutes
    done = json.loads(args.results.read_text()) if args.results.exists() else {"rows": {}}
    models = Models(args.data, args.device, args.layers, args.windows)
    if "coefficients" not in done:
        names = list(models.clean)
        own = fisher(models.judge, models.text(16))
        noise = noise_responses(models.judge, models.text(4), layers=names, levels=(0.1, 0.3))
        done["coefficients"] = {
            "fisher": {n: own[n] for n in names},
            "noise": {r.layer: r.coefficient for r in noise},
        }
    done["device"] = args.device
    for tag in args.only:
        for key, allocation, expected in rows(models, tag, done["coefficients"]):
            if key in done["rows"] or time.time() > stop:
                continue
            size = models.bits(
                {n: f"{s:g}" for n, s in allocation.items()}, {f"{s:g}": c for s, c in FAMILIES[tag].items()}
            )
            done["rows"][key] = models.measure({n: f"{tag} {s}" for n, s in allocation.items()}) | {
                "bits": size, "expected": expected, "sizes": list(allocation.values()),
            }  # fmt: skip
            args.results.write_text(json.dumps(done))
            print(key, f"{size:.4f} bits, KL {done['rows'][key]['kl']:.4f}, expected {expected}", flush=True)
        models.values.clear()
    for tag, budget in itertools.product(args.only, BUDGETS):
        start = f"{tag}/{budget:g}/"
        own = {k: r for k, r in done["rows"].items() if k.startswith(start) and "quantized" not in k}
        if args.layers is not None or f"{start}search" not in own:
            continue
        best = min((k for k in own if "/search" not in k), key=lambda k: own[k]["kl"])
        for key in (f"{start}search", best):
            name = f"{key}, quantized"
            if name in done["rows"] or time.time() > stop:
                continue
            allocation = dict(zip(models.clean, own[key]["sizes"], strict=True))
            done["rows"][name] = quantized(models, recipe(FAMILIES[tag], allocation), args.device)
            args.results.write_text(json.dumps(done))
            print(name, done["rows"][name], flush=True)
    args.results.with_suffix(".md").write_text(markdown(done))


def rows(models: Models, tag: str, found: dict):
    """(key, allocation, expected KL or None) of a family, whose layers are solved first."""
    names, family = list(models.clean), FAMILIES[tag]
    for size, choice in family.items():
        models.solve(f"{tag} {size}", choice)
    for size in family:
        yield f"{tag}/{size:g} everywhere", dict.fromkeys(names, size), None
    for budget in BUDGETS:
        for said, allocation, expected in searched(models, family, tag, budget, found):
            yield f"{tag}/{budget:g}/{said}", allocation, expected
        for said, allocation in plain(names, list(family), budget):
            yield f"{tag}/{budget:g}/{said}", allocation, None


def markdown(done: dict) -> str:
    """A table for each family and budget."""
    lines = [
        "# Bits under a budget", "",
        f"Printed by `python benchmarks/search_bits.py` on {done['device']} (its first lines say what is",
        "measured). SmolLM2, KL on WikiText-2 raw test in nats per token.", "",
    ]  # fmt: skip
    for tag, budget in itertools.product(FAMILIES, BUDGETS):
        start = f"{tag}/{budget:g}/"
        own = {k.removeprefix(start): r for k, r in done["rows"].items() if k.startswith(start)}
        if not own:
            continue
        around = [s for s in FAMILIES[tag] if f"{tag}/{s:g} everywhere" in done["rows"]]
        low, high = (max(s for s in around if s < budget), min(s for s in around if s > budget))
        lines += [f"## {tag}, {budget:g} bits", "", "| | bits | expected KL | KL | ± | perplexity |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        ends = [done["rows"][f"{tag}/{s:g} everywhere"] for s in (low, high)]
        share = (budget - low) / (high - low)
        line = math.exp((1 - share) * math.log(ends[0]["kl"]) + share * math.log(ends[1]["kl"]))
        lines += [f"| {s:g} everywhere | {_cells(r)} |" for s, r in zip((low, high), ends, strict=True)]
        lines += [f"| the line between them | | | {line:.4f} | | |"]
        for said, r in sorted(own.items(), key=lambda pair: pair[1]["kl"]):
            lines.append(f"| {'**' + said + '**' if said.startswith('search') else said} | {_cells(r)} |")
        lines.append("")
    return "\n".join(lines)


def _cells(r: dict) -> str:
    expected = "" if r.get("expected") is None else f"{r['expected']:.4f}"
    perplexity = math.exp(min(r["nll"], 20))
    error = "" if r["kl_error"] is None else f"{r['kl_error']:.4f}"
    return f"{r['bits']:.4f} | {expected} | {r['kl']:.4f} | {error} | {perplexity:.2f}"


if __name__ == "__main__":
    main()
